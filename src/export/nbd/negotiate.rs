//! Option haggling of fixed newstyle negotiation, up to the start of transmission.
//!
//! Reads exactly what an option takes and nothing beyond, so that TLS and the transmission phase
//! find the stream at its right place, and nothing sent in clear is taken for encrypted. Memory is
//! bounded by [`NBD_OPTION_BYTES_MAX`]. Knows nothing of requests.

use std::io;
use std::rc::Rc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::server::Server;
use super::wire::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, Fields, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    OptionHeader, OptionReplyHeader, STRING_BYTES_MAX, export_flag, handshake_flag, info, option,
    option_reply,
};
use crate::export::BlockTarget;
use crate::id::BLOCK_SIZE;
use crate::limits::{NBD_OPTION_BYTES_MAX, NBD_OPTIONS_MAX, REQUEST_BYTES_MAX};

/// Replies are sent when this many bytes are gathered, or the option is answered.
const REPLY_BUFFER_BYTES: usize = 64 << 10;
/// An option with more data than this is not even skipped.
const SKIP_BYTES_MAX: u64 = 1 << 20;

/// How a negotiation ended well.
pub(super) enum Outcome {
    /// The client chose an export.
    Transmit(Agreed),
    /// The client wants TLS, and was told to begin.
    StartTls,
    /// The client left as the protocol has it.
    Left,
}

/// What the two sides agreed on.
pub(super) struct Agreed {
    /// Name of the export.
    pub(super) name: String,
    /// The volume.
    pub(super) target: Rc<dyn BlockTarget>,
    /// Whether replies are structured.
    pub(super) structured: bool,
    /// Whether `base:allocation` may be queried.
    pub(super) allocation: bool,
}

/// Why a negotiation failed; the connection is closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NegotiationError {
    #[error("the connection broke in the handshake: {0}")]
    Io(#[from] io::Error),
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    #[error("garbage instead of an option: {0:#018x}")]
    OptionMagic(u64),
    #[error("option {option} without fixed newstyle")]
    NotFixed { option: u32 },
    #[error("option {option} with {len} bytes of data")]
    TooLong { option: u32, len: u32 },
    #[error("more than {NBD_OPTIONS_MAX} options")]
    TooMany,
    #[error("EXPORT_NAME refused: {0}")]
    ExportName(String),
}

/// Flags that the client sent in its part of the greeting.
#[derive(Clone, Copy)]
pub(super) struct ClientFlags {
    fixed: bool,
    no_zeroes: bool,
}

/// Sends the greeting and reads the client's flags.
pub(super) async fn greet<S>(stream: &mut S) -> Result<ClientFlags, NegotiationError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    const OFFERED: u16 = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    let mut greeting = [0; 18];
    greeting[..8].copy_from_slice(INIT_MAGIC);
    greeting[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    greeting[16..].copy_from_slice(&OFFERED.to_be_bytes());
    stream.write_all(&greeting).await?;
    stream.flush().await?;
    let flags = stream.read_u32().await?;
    if flags & !u32::from(OFFERED) != 0 {
        return Err(NegotiationError::ClientFlags(flags));
    }
    Ok(ClientFlags {
        fixed: flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0,
        no_zeroes: flags & u32::from(handshake_flag::NO_ZEROES) != 0,
    })
}

/// An error reply: its type and a text for a human.
struct Refusal(u32, String);

impl Refusal {
    fn new(kind: u32, text: impl Into<String>) -> Self {
        Self(kind, text.into())
    }

    fn invalid(text: &str) -> Self {
        Self::new(option_reply::ERR_INVALID, text)
    }
}

/// One run of option haggling, on a plain or an encrypted stream.
pub(super) struct Negotiation<'a, S> {
    pub(super) stream: &'a mut S,
    pub(super) server: &'a Server,
    pub(super) flags: ClientFlags,
    /// Whether the stream is encrypted.
    pub(super) encrypted: bool,
    /// Every option but ABORT is refused with this text.
    pub(super) refuse: Option<&'a str>,
    state: State,
}

/// What options have set; a run begins with the default, so TLS forgets what was set before it.
#[derive(Default)]
struct State {
    structured: bool,
    /// Export that `base:allocation` was selected for.
    allocation: Option<String>,
    replies: Vec<u8>,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Negotiation<'a, S> {
    pub(super) fn new(
        stream: &'a mut S,
        server: &'a Server,
        flags: ClientFlags,
        encrypted: bool,
        refuse: Option<&'a str>,
    ) -> Self {
        Self { stream, server, flags, encrypted, refuse, state: State::default() }
    }

    /// Answers options until one of them ends the negotiation.
    pub(super) async fn run(mut self) -> Result<Outcome, NegotiationError> {
        for _ in 0..NBD_OPTIONS_MAX {
            let (option, data) = self.read_option().await?;
            let outcome = match data {
                None => {
                    let text = format!("an option may have {NBD_OPTION_BYTES_MAX} bytes of data");
                    self.refuse(option, &Refusal(option_reply::ERR_TOO_BIG, text));
                    None
                }
                Some(data) => self.answer(option, &data).await?,
            };
            self.send().await?;
            if let Some(outcome) = outcome {
                return Ok(outcome);
            }
        }
        Err(NegotiationError::TooMany)
    }

    /// Reads an option; its data is none if it was too large and skipped.
    async fn read_option(&mut self) -> Result<(u32, Option<Vec<u8>>), NegotiationError> {
        let mut header = [0; size_of::<OptionHeader>()];
        self.stream.read_exact(&mut header).await?;
        let header: OptionHeader = zerocopy::transmute!(header);
        if header.magic.get() != OPTION_MAGIC {
            return Err(NegotiationError::OptionMagic(header.magic.get()));
        }
        let (option, len) = (header.option.get(), header.len.get());
        if !self.flags.fixed && option != option::EXPORT_NAME {
            return Err(NegotiationError::NotFixed { option });
        }
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        if bytes <= NBD_OPTION_BYTES_MAX {
            let mut data = vec![0; bytes];
            self.stream.read_exact(&mut data).await?;
            return Ok((option, Some(data)));
        }
        if option == option::EXPORT_NAME || u64::from(len) > SKIP_BYTES_MAX {
            return Err(NegotiationError::TooLong { option, len });
        }
        let skipped =
            tokio::io::copy(&mut (&mut *self.stream).take(len.into()), &mut tokio::io::sink())
                .await?;
        if skipped < u64::from(len) {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok((option, None))
    }

    async fn answer(
        &mut self,
        option: u32,
        data: &[u8],
    ) -> Result<Option<Outcome>, NegotiationError> {
        if option == option::ABORT {
            self.reply(option, option_reply::ACK, &[]);
            return Ok(Some(Outcome::Left));
        }
        if option == option::EXPORT_NAME {
            return self.export_name(data).await.map(Some);
        }
        let answer = match self.precondition(option) {
            Some(refusal) => Err(refusal),
            None => match option {
                option::LIST => self.list(data).await?,
                option::STARTTLS => self.start_tls(data),
                option::INFO | option::GO => self.info_or_go(option, data).await,
                option::STRUCTURED_REPLY => self.structured_reply(data),
                option::LIST_META_CONTEXT => self.meta_context(option, data).await,
                option::SET_META_CONTEXT => {
                    self.state.allocation = None;
                    self.meta_context(option, data).await
                }
                _ => Err(Refusal(option_reply::ERR_UNSUP, format!("unknown option {option}"))),
            },
        };
        match answer {
            Ok(outcome) => {
                self.reply(option, option_reply::ACK, &[]);
                Ok(outcome)
            }
            Err(refusal) => {
                self.refuse(option, &refusal);
                Ok(None)
            }
        }
    }

    /// What keeps any option from being answered.
    fn precondition(&self, option: u32) -> Option<Refusal> {
        if let Some(text) = self.refuse {
            return Some(Refusal::new(option_reply::ERR_POLICY, text));
        }
        if self.server.shared.stopping() {
            return Some(Refusal::new(option_reply::ERR_SHUTDOWN, "the server is stopping"));
        }
        (self.must_encrypt() && option != option::STARTTLS)
            .then(|| Refusal::new(option_reply::ERR_TLS_REQD, "this server requires TLS"))
    }

    fn must_encrypt(&self) -> bool {
        self.server.shared.config.tls.required() && !self.encrypted
    }

    async fn export_name(&mut self, data: &[u8]) -> Result<Outcome, NegotiationError> {
        let refuse = |text: &str| Err(NegotiationError::ExportName(text.to_owned()));
        if let Some(Refusal(_, text)) = self.precondition(option::EXPORT_NAME) {
            return refuse(&text);
        }
        let (name, target) = match self.open(data).await {
            Ok(found) => found,
            Err(Refusal(_, text)) => return refuse(&text),
        };
        let replies = &mut self.state.replies;
        replies.extend(target.size().to_be_bytes());
        replies.extend(export_flags(&*target, self.state.structured).to_be_bytes());
        if !self.flags.no_zeroes {
            replies.resize(replies.len() + 124, 0);
        }
        Ok(Outcome::Transmit(self.agree(name, target)))
    }

    fn agree(&mut self, name: String, target: Rc<dyn BlockTarget>) -> Agreed {
        let allocation = self.state.structured && self.state.allocation.as_ref() == Some(&name);
        Agreed { name, target, structured: self.state.structured, allocation }
    }

    /// Finds the export with the name in `bytes`.
    async fn open(&self, bytes: &[u8]) -> Result<(String, Rc<dyn BlockTarget>), Refusal> {
        if bytes.len() > STRING_BYTES_MAX {
            let text = format!("a name may have {STRING_BYTES_MAX} bytes");
            return Err(Refusal(option_reply::ERR_TOO_BIG, text));
        }
        let name = std::str::from_utf8(bytes)
            .ok()
            .filter(|name| !name.contains('\0'))
            .ok_or_else(|| Refusal::invalid("the name is not UTF-8, or contains a zero byte"))?;
        match self.server.directory.open(name).await {
            Some(target) => Ok((name.to_owned(), target)),
            None => Err(Refusal(
                option_reply::ERR_UNKNOWN,
                format!("there is no export {name:?}; LIST (nbdinfo --list) shows all"),
            )),
        }
    }

    async fn list(
        &mut self,
        data: &[u8],
    ) -> Result<Result<Option<Outcome>, Refusal>, NegotiationError> {
        if !data.is_empty() {
            return Ok(Err(Refusal::invalid("LIST takes no data")));
        }
        for name in self.server.directory.list() {
            let Ok(len) = u32::try_from(name.len()) else { continue };
            let reply = [&len.to_be_bytes()[..], name.as_bytes()].concat();
            self.reply(option::LIST, option_reply::SERVER, &reply);
            if self.state.replies.len() >= REPLY_BUFFER_BYTES {
                self.send().await?;
            }
        }
        Ok(Ok(None))
    }

    fn start_tls(&mut self, data: &[u8]) -> Result<Option<Outcome>, Refusal> {
        if !data.is_empty() {
            return Err(Refusal::invalid("STARTTLS takes no data"));
        }
        if self.encrypted {
            return Err(Refusal::invalid("TLS is on already"));
        }
        if self.server.shared.config.tls.acceptor().is_none() {
            return Err(Refusal::new(option_reply::ERR_POLICY, "TLS is not configured here"));
        }
        Ok(Some(Outcome::StartTls))
    }

    async fn info_or_go(&mut self, option: u32, data: &[u8]) -> Result<Option<Outcome>, Refusal> {
        let malformed = || Refusal::invalid("malformed INFO or GO");
        let mut fields = Fields(data);
        let name = fields.string().ok_or_else(malformed)?;
        let count = fields.u16().ok_or_else(malformed)?;
        let mut wanted = Vec::with_capacity(usize::from(count).min(data.len() / 2));
        for _ in 0..count {
            wanted.push(fields.u16().ok_or_else(malformed)?);
        }
        if !fields.0.is_empty() {
            return Err(malformed());
        }
        let (name, target) = self.open(name).await?;
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend(target.size().to_be_bytes());
        export.extend(export_flags(&*target, self.state.structured).to_be_bytes());
        self.reply(option, option_reply::INFO, &export);
        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [1, BLOCK_SIZE, REQUEST_BYTES_MAX] {
            let size = u32::try_from(size).expect("block sizes are below 4 GiB");
            sizes.extend(size.to_be_bytes());
        }
        self.reply(option, option_reply::INFO, &sizes);
        if wanted.contains(&info::NAME) {
            let canonical = [&info::NAME.to_be_bytes()[..], name.as_bytes()].concat();
            self.reply(option, option_reply::INFO, &canonical);
        }
        let go = option == option::GO;
        Ok(go.then(|| Outcome::Transmit(self.agree(name, target))))
    }

    fn structured_reply(&mut self, data: &[u8]) -> Result<Option<Outcome>, Refusal> {
        if !data.is_empty() {
            return Err(Refusal::invalid("STRUCTURED_REPLY takes no data"));
        }
        self.state.structured = true;
        Ok(None)
    }

    async fn meta_context(&mut self, option: u32, data: &[u8]) -> Result<Option<Outcome>, Refusal> {
        if !self.state.structured {
            return Err(Refusal::invalid("metadata contexts need STRUCTURED_REPLY first"));
        }
        let malformed = || Refusal::invalid("malformed list of metadata queries");
        let set = option == option::SET_META_CONTEXT;
        let mut fields = Fields(data);
        let name = fields.string().ok_or_else(malformed)?;
        let count = fields.u32().ok_or_else(malformed)?;
        let mut matched = count == 0 && !set;
        for _ in 0..count {
            let query = fields.string().ok_or_else(malformed)?;
            matched |= query == BASE_ALLOCATION.as_bytes() || (query == b"base:" && !set);
        }
        if !fields.0.is_empty() {
            return Err(malformed());
        }
        let (name, _) = self.open(name).await?;
        if matched {
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            let reply = [&id.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()].concat();
            self.reply(option, option_reply::META_CONTEXT, &reply);
        }
        if set && matched {
            self.state.allocation = Some(name);
        }
        Ok(None)
    }

    fn refuse(&mut self, option: u32, refusal: &Refusal) {
        tracing::debug!(option, reason = refusal.1, "NBD option refused");
        let mut end = refusal.1.len().min(STRING_BYTES_MAX);
        while !refusal.1.is_char_boundary(end) {
            end -= 1;
        }
        self.reply(option, refusal.0, &refusal.1.as_bytes()[..end]);
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let header = OptionReplyHeader {
            magic: U64::new(OPTION_REPLY_MAGIC),
            option: U32::new(option),
            kind: U32::new(kind),
            len: U32::new(u32::try_from(data.len()).expect("replies are short")),
        };
        self.state.replies.extend(header.as_bytes());
        self.state.replies.extend(data);
    }

    async fn send(&mut self) -> Result<(), NegotiationError> {
        self.stream.write_all(&self.state.replies).await?;
        self.stream.flush().await?;
        self.state.replies.clear();
        Ok(())
    }
}

/// What the export can do. Writes are durable when they are answered, and a flush covers all
/// connections since they share the target: so several connections are safe.
fn export_flags(target: &dyn BlockTarget, structured: bool) -> u16 {
    use export_flag as flag;
    let mut flags = flag::HAS_FLAGS
        | flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::CAN_MULTI_CONN
        | flag::SEND_CACHE;
    if target.read_only() {
        flags |= flag::READ_ONLY;
    } else {
        flags |= flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
    }
    if structured {
        flags |= flag::SEND_DF;
    }
    flags
}
