//! Lists: a snapshot of one revision, in pages.

use bytes::Bytes;
use etcd_client::{Client, GetOptions, GetResponse};

use super::Shared;
use super::failure::Failure;
use super::link::unsigned;
use crate::meta::state::check_size;
use crate::meta::{
    KEY_BYTES_MAX, Listing, MetaError, MetaResult, STORE_BYTES_MAX, VALUE_BYTES_MAX, Versioned,
};

/// Keys of the first page, and of every one after a page that was too large.
const PAGE_KEYS_MIN: i64 = 64;
/// Keys of a page at most.
const PAGE_KEYS_MAX: i64 = 4096;
/// A page of less than this is followed by one of twice as many keys.
const PAGE_BYTES_SMALL: usize = 1 << 20;
/// Largest answer that is taken: the fewest keys of a page, each as large as can be, with what
/// surrounds them.
pub(super) const ANSWER_BYTES_MAX: usize = 80 << 20;
/// How often a list is begun anew when its revision is compacted meanwhile.
const TRIES: usize = 4;

const _: () = assert!(64 * (VALUE_BYTES_MAX + 2 * KEY_BYTES_MAX + 256) < ANSWER_BYTES_MAX);

/// A list that is under way.
#[derive(Default)]
struct Pages {
    listing: Listing,
    bytes: usize,
}

/// A page that cannot be had.
enum PageError {
    Compacted,
    TooLarge,
    Failed(MetaError),
}

impl Shared {
    /// All keys with a prefix, at one revision.
    pub(super) async fn list(&self, prefix: &str) -> MetaResult<Listing> {
        for _ in 0..TRIES {
            if let Some(listing) = self.list_once(prefix).await? {
                return Ok(listing);
            }
        }
        Err(MetaError::Unavailable("etcd is compacted faster than it is listed".into()))
    }

    /// None if the revision was compacted before the last page.
    async fn list_once(&self, prefix: &str) -> MetaResult<Option<Listing>> {
        let (mut begin, end) = self.keys.range(prefix);
        let mut pages = Pages::default();
        let mut keys = PAGE_KEYS_MIN;
        loop {
            let revision = pages.listing.revision;
            let page = match self.page(&begin, &end, keys, revision).await {
                Ok(page) => page,
                Err(PageError::Compacted) => return Ok(None),
                Err(PageError::TooLarge) if keys > PAGE_KEYS_MIN => {
                    keys = PAGE_KEYS_MIN;
                    continue;
                }
                Err(PageError::TooLarge) => {
                    return Err(MetaError::Corrupt("a value in etcd is not of sds".into()));
                }
                Err(PageError::Failed(error)) => return Err(error),
            };
            let more = page.more();
            let bytes = pages.bytes;
            let Some(last) = pages.add(self, page)? else { return Ok(Some(pages.listing)) };
            if !more {
                return Ok(Some(pages.listing));
            }
            begin = [&*last, &[0]].concat();
            if pages.bytes - bytes < PAGE_BYTES_SMALL {
                keys = (keys * 2).min(PAGE_KEYS_MAX);
            }
        }
    }

    /// One page, of the newest revision if that is 0.
    async fn page(
        &self,
        begin: &[u8],
        end: &[u8],
        keys: i64,
        revision: u64,
    ) -> Result<GetResponse, PageError> {
        let revision = i64::try_from(revision).unwrap_or(i64::MAX);
        let get = async |client: Client| {
            let options =
                GetOptions::new().with_range(end).with_limit(keys).with_revision(revision);
            let mut kv = client.kv_client().max_decoding_message_size(ANSWER_BYTES_MAX);
            match kv.get(begin, Some(options)).await {
                Err(etcd_client::Error::GRpcStatus(status)) if is_too_large(&status) => Ok(None),
                page => page.map(Some),
            }
        };
        match self.link.read_newest(get).await {
            Ok(Some(page)) => Ok(page),
            Ok(None) => Err(PageError::TooLarge),
            Err(Failure::Compacted) => Err(PageError::Compacted),
            Err(failure) => Err(PageError::Failed(failure.of_read())),
        }
    }
}

/// Whether the client refused an answer for its size.
fn is_too_large(status: &tonic::Status) -> bool {
    status.code() == tonic::Code::OutOfRange && status.message().contains("message length")
}

impl Pages {
    /// Adds a page; its last key as etcd has it, none if the page is empty.
    fn add(&mut self, shared: &Shared, mut page: GetResponse) -> MetaResult<Option<Vec<u8>>> {
        if self.listing.revision == 0 {
            self.listing.revision = page.header().map_or(0, |header| unsigned(header.revision()));
        }
        let mut last = None;
        for kv in page.take_kvs() {
            let revision = unsigned(kv.mod_revision());
            let (key, value) = kv.into_key_value();
            self.bytes += key.len() + value.len();
            check_size("a list, in bytes,", self.bytes, STORE_BYTES_MAX)?;
            let name = shared
                .keys
                .strip(&key)
                .ok_or_else(|| MetaError::Corrupt("a key in etcd is not UTF-8".into()))?;
            self.listing.entries.push((name, Versioned { value: Bytes::from(value), revision }));
            last = Some(key);
        }
        Ok(last)
    }
}
