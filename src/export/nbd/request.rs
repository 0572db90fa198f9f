//! One request: what it asks for, whether it may, doing it, and its reply.
//!
//! Source of the error numbers: "Error values" and "Request types" of the protocol document.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bytes::Bytes;
use tokio::time::Instant;
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::metrics::{Gauge, NbdMetrics};
use super::permits::Permits;
use super::reply::ReplyQueue;
use super::wire::{
    BASE_ALLOCATION_ID, ChunkHeader, Command, DataChunk, Errno, Extent, RequestHeader,
    STRING_BYTES_MAX, SimpleReply, chunk, command_flag, extent_state,
};
use crate::export::{BlockTarget, MapExtent, TargetError};
use crate::id::BLOCK_BYTES;
use crate::limits::{NBD_EXTENTS_MAX, NBD_READ_PIECE_BYTES, REQUEST_BYTES_MAX};

/// What a connection in the transmission phase shares with its running requests.
pub(super) struct Connection {
    pub(super) target: Rc<dyn BlockTarget>,
    /// Whether replies are structured.
    pub(super) structured: bool,
    /// Whether `base:allocation` was selected.
    pub(super) allocation: bool,
    pub(super) metrics: Rc<NbdMetrics>,
    pub(super) permits: Permits,
    pub(super) replies: RefCell<ReplyQueue>,
    /// New requests are refused.
    pub(super) stopping: Cell<bool>,
}

/// Why a request fails: the number, and a text for a human where replies are structured.
#[derive(Debug)]
pub(super) struct Failure(pub(super) Errno, pub(super) String);

impl Failure {
    pub(super) fn new(errno: Errno, text: &str) -> Self {
        Self(errno, text.to_owned())
    }
}

/// A request as it came, not yet judged.
#[derive(Debug)]
pub(super) struct Request {
    /// The command, or its number if it is unknown.
    pub(super) command: Result<Command, u16>,
    flags: u16,
    cookie: u64,
    offset: u64,
    pub(super) len: u32,
}

/// Content of a successful reply.
enum Content {
    None,
    /// The last (or only) piece of a read, from this offset.
    Data(u64, Vec<Bytes>),
    Extents(Vec<Extent>),
}

impl Request {
    pub(super) fn new(header: &RequestHeader) -> Self {
        let number = header.command.get();
        Self {
            command: Command::from_wire(number).ok_or(number),
            flags: header.flags.get(),
            cookie: header.cookie.get(),
            offset: header.offset.get(),
            len: header.len.get(),
        }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Bytes that follow the header.
    pub(super) fn payload_bytes(&self) -> u32 {
        if self.command == Ok(Command::Write) { self.len } else { 0 }
    }

    /// Bytes of memory that the request takes until its reply was sent, if it is carried out.
    pub(super) fn charge(&self) -> usize {
        match self.command {
            Ok(Command::Read | Command::Write) => self.len_usize().min(REQUEST_BYTES_MAX),
            _ => 0,
        }
    }

    fn len_usize(&self) -> usize {
        usize::try_from(self.len).expect("usize has at least 32 bits")
    }

    /// Judges all that can be judged without carrying it out.
    pub(super) fn check(&self, connection: &Connection) -> Result<Command, Failure> {
        let invalid = |text: &str| Err(Failure::new(Errno::Inval, text));
        let command = self
            .command
            .map_err(|number| Failure(Errno::Inval, format!("unknown command {number}")))?;
        let df_allowed = connection.structured || !self.has(command_flag::DF);
        if self.flags & !command.flags() != 0 || !df_allowed {
            let text = format!("flags {:#x} are not valid for {}", self.flags, command.name());
            return Err(Failure(Errno::Inval, text));
        }
        if command == Command::Flush {
            let plain = self.offset == 0 && self.len == 0;
            return if plain { Ok(command) } else { invalid("a flush has no range") };
        }
        if command.changes() && connection.target.read_only() {
            return Err(Failure::new(Errno::Perm, "the export is read-only"));
        }
        if command == Command::BlockStatus && !connection.allocation {
            return invalid("no metadata context was selected");
        }
        if self.len == 0 {
            return invalid("the range is empty");
        }
        self.check_size(command, connection)?;
        let end = self.offset.checked_add(self.len.into());
        if end.is_none_or(|end| end > connection.target.size()) {
            return Err(out_of_range(command));
        }
        if self.has(command_flag::FAST_ZERO) && self.has(command_flag::NO_HOLE) {
            return Err(Failure::new(Errno::NotSup, "zeroes with storage are written out"));
        }
        Ok(command)
    }

    fn check_size(&self, command: Command, connection: &Connection) -> Result<(), Failure> {
        let carries = matches!(command, Command::Read | Command::Write);
        if !carries || self.len_usize() <= REQUEST_BYTES_MAX {
            return Ok(());
        }
        let split = command == Command::Read && connection.structured;
        let errno = if split { Errno::Overflow } else { Errno::Inval };
        Err(Failure(errno, format!("a request may have {REQUEST_BYTES_MAX} bytes")))
    }
}

fn out_of_range(command: Command) -> Failure {
    let grows = matches!(command, Command::Write | Command::WriteZeroes);
    let errno = if grows { Errno::NoSpc } else { Errno::Inval };
    Failure::new(errno, "the range is beyond the end of the volume")
}

fn failure(command: Command, error: &TargetError) -> Failure {
    let errno = match error {
        TargetError::OutOfRange => return out_of_range(command),
        TargetError::NoSpace => Errno::NoSpc,
        TargetError::ReadOnly => Errno::Perm,
        TargetError::Io(_) => Errno::Io,
        TargetError::Stopped => Errno::Shutdown,
    };
    Failure(errno, error.to_string())
}

/// Carries out a request that passed [`Request::check`] and holds a permit for
/// [`Request::charge`] bytes; queues its reply.
pub(super) async fn execute(connection: Rc<Connection>, request: Request, payload: Bytes) {
    let Ok(command) = request.command else { return };
    let _running = Gauge::new(&connection.metrics.requests_running);
    let started = Instant::now();
    let result = match connection.run(command, &request, payload).await {
        Ok(content) => {
            connection.reply(&request, content);
            Ok(())
        }
        Err(error) => {
            let failure = failure(command, &error);
            let errno = failure.0;
            connection.reply_error(&request, &failure);
            Err(errno)
        }
    };
    connection.replies.borrow_mut().push_charge(request.charge());
    connection.metrics.record(command, request.len.into(), result, started.elapsed());
}

impl Connection {
    /// Answers a request that [`Request::check`] refused, and that holds a permit for 0 bytes.
    pub(super) fn refuse(&self, request: &Request, failure: &Failure) {
        self.reply_error(request, failure);
        self.replies.borrow_mut().push_charge(0);
        match request.command {
            Ok(command) => {
                self.metrics.record(command, 0, Err(failure.0), std::time::Duration::ZERO);
            }
            Err(_) => self.metrics.record_error(failure.0),
        }
    }

    /// Durability (FUA, FLUSH): the target answers a write when it is durable, so FUA needs
    /// nothing more.
    async fn run(
        &self,
        command: Command,
        request: &Request,
        payload: Bytes,
    ) -> Result<Content, TargetError> {
        let (offset, len) = (request.offset, u64::from(request.len));
        match command {
            Command::Read => return self.read(request).await,
            Command::BlockStatus => {
                let max = if request.has(command_flag::REQ_ONE) { 1 } else { NBD_EXTENTS_MAX };
                let extents = self.target.map(offset, len, max).await?;
                return block_status(&extents, request.len, max).map(Content::Extents);
            }
            Command::Write => self.target.write(offset, payload).await?,
            Command::Flush => self.target.flush().await?,
            Command::Trim => {
                // A trim is a hint: parts of blocks have no storage to give back.
                let start = offset.next_multiple_of(BLOCK_BYTES);
                let end = (offset + len) / BLOCK_BYTES * BLOCK_BYTES;
                if start < end {
                    self.target.zero(start, end - start, true).await?;
                }
            }
            Command::WriteZeroes => {
                let unmap = !request.has(command_flag::NO_HOLE);
                self.target.zero(offset, len, unmap).await?;
            }
            // Looking a range up is what makes a volume load its index.
            Command::Cache => drop(self.target.map(offset, len, 1).await?),
            Command::Disconnect => {}
        }
        Ok(Content::None)
    }

    /// Reads in pieces. Where the reply may be split, all but the last are queued at once.
    async fn read(&self, request: &Request) -> Result<Content, TargetError> {
        let split = self.structured && !request.has(command_flag::DF);
        let mut offset = request.offset;
        let mut left = request.len_usize();
        let mut gathered = Vec::new();
        loop {
            let len = left.min(NBD_READ_PIECE_BYTES);
            let data = self.target.read(offset, len).await?;
            if data.iter().map(Bytes::len).sum::<usize>() != len {
                return Err(TargetError::Io(format!("read of {len} bytes at {offset} came short")));
            }
            left -= len;
            if left == 0 {
                if gathered.is_empty() {
                    return Ok(Content::Data(offset, data));
                }
                gathered.extend(data);
                return Ok(Content::Data(request.offset, gathered));
            }
            if split {
                self.push_data_chunk(request, offset, data, false);
            } else {
                gathered.extend(data);
            }
            offset += len as u64;
        }
    }

    fn reply(&self, request: &Request, content: Content) {
        match content {
            Content::Data(offset, data) if self.structured => {
                self.push_data_chunk(request, offset, data, true);
            }
            Content::Extents(extents) => {
                let fixed = size_of_val(&BASE_ALLOCATION_ID);
                let len = short(fixed + extents.as_bytes().len());
                let header = ChunkHeader::new(request.cookie, chunk::BLOCK_STATUS, len, true);
                let mut replies = self.replies.borrow_mut();
                replies.push_header(header.as_bytes());
                replies.push_header(&BASE_ALLOCATION_ID.to_be_bytes());
                replies.push_data(Bytes::copy_from_slice(extents.as_bytes()));
            }
            Content::None | Content::Data(..) => {
                let mut replies = self.replies.borrow_mut();
                replies.push_header(SimpleReply::new(request.cookie, None).as_bytes());
                if let Content::Data(_, data) = content {
                    for piece in data {
                        replies.push_data(piece);
                    }
                }
            }
        }
    }

    fn push_data_chunk(&self, request: &Request, offset: u64, data: Vec<Bytes>, done: bool) {
        let len = short(size_of::<u64>() + data.iter().map(Bytes::len).sum::<usize>());
        let header = DataChunk {
            header: ChunkHeader::new(request.cookie, chunk::OFFSET_DATA, len, done),
            offset: U64::new(offset),
        };
        let mut replies = self.replies.borrow_mut();
        replies.push_header(header.as_bytes());
        for piece in data {
            replies.push_data(piece);
        }
    }

    fn reply_error(&self, request: &Request, Failure(errno, text): &Failure) {
        let mut replies = self.replies.borrow_mut();
        if !self.structured {
            replies.push_header(SimpleReply::new(request.cookie, Some(*errno)).as_bytes());
            return;
        }
        let text = &text.as_bytes()[..text.len().min(STRING_BYTES_MAX)];
        let text_len = u16::try_from(text.len()).expect("a string is at most 4096 bytes");
        let len = short(size_of::<u32>() + size_of::<u16>() + text.len());
        let header = ChunkHeader::new(request.cookie, chunk::ERROR, len, true);
        replies.push_header(header.as_bytes());
        replies.push_header(&errno.code().to_be_bytes());
        replies.push_header(&text_len.to_be_bytes());
        replies.push_data(Bytes::copy_from_slice(text));
    }
}

fn short(len: usize) -> u32 {
    u32::try_from(len).expect("a chunk is bounded by the largest request")
}

/// Extents on the wire: within the request, at most `max`.
fn block_status(extents: &[MapExtent], len: u32, max: usize) -> Result<Vec<Extent>, TargetError> {
    let mut left = len;
    let mut out = Vec::with_capacity(extents.len().min(max));
    for extent in extents.iter().take(max) {
        let len = u32::try_from(extent.len).unwrap_or(u32::MAX).min(left);
        if len == 0 {
            break;
        }
        left -= len;
        let state = if extent.allocated { 0 } else { extent_state::HOLE | extent_state::ZERO };
        out.push(Extent { len: U32::new(len), state: U32::new(state) });
    }
    if out.is_empty() {
        return Err(TargetError::Io("the volume reported no extent".to_owned()));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_stay_within_the_request() {
        let extents = [
            MapExtent { len: 4096, allocated: true },
            MapExtent { len: 1 << 40, allocated: false },
        ];
        let out = block_status(&extents, 10_000, 16).unwrap();
        let out: Vec<_> = out.iter().map(|e| (e.len.get(), e.state.get())).collect();
        assert_eq!(out, [(4096, 0), (5904, 3)]);
        assert_eq!(block_status(&extents, 10_000, 1).unwrap().len(), 1);
        assert!(block_status(&[], 10_000, 1).is_err());
    }
}
