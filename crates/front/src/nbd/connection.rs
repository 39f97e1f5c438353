//! One connection in the transmission phase: requests in, replies out, nothing lost between.
//!
//! ```text
//! OPEN --DISC------> DRAINING   no more frames; in-flight requests are answered, then close
//! OPEN --shut_down-> STOPPING   each new request gets ESHUTDOWN; DISC -> DRAINING
//! ```

use super::errno::Errno;
use super::framing::{RawRequest, command};
use super::{INFLIGHT_BYTES_MAX, REQUEST_BYTES_MAX, REQUESTS_MAX, SECTOR_BYTES};
use proto::Status;
use proto::block::{BlockData, BlockOp, BlockRequest};
use proto::disk::BufList;
use proto::frame::{Frame, FrameError, OutFrame};

const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const REPLY_FLAG_DONE: u16 = 1;
const REPLY_TYPE_NONE: u16 = 0;
const REPLY_TYPE_OFFSET_DATA: u16 = 1;
const REPLY_TYPE_ERROR: u16 = (1 << 15) + 1;

const FLAG_FUA: u16 = 1;
const FLAG_NO_HOLE: u16 = 2;
const FLAG_DF: u16 = 4;

/// What the handshake agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parameters {
    /// Size of the export.
    pub size_bytes: u64,
    /// Whether every write is refused.
    pub is_read_only: bool,
    /// Whether structured replies were negotiated.
    pub is_structured: bool,
    /// Longest READ or WRITE on this connection, at most [`REQUEST_BYTES_MAX`].
    pub request_bytes_max: u32,
}

/// What a frame asks of the lane.
#[derive(Debug)]
pub enum Incoming {
    /// Carry this out, then call [`NbdConnection::complete`] with its id.
    Request(BlockRequest),
    /// Send this; the request is answered already.
    Reply(OutFrame),
    /// DISC: read no more, and close when [`NbdConnection::is_idle`].
    Disconnect,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Open,
    Stopping,
    Draining,
}

/// A request that waits for its result.
#[derive(Clone, Copy, Debug)]
struct Pending {
    id: u64,
    cookie: u64,
    offset: u64,
    /// Data bytes that it holds or will hold.
    length: u32,
    is_read: bool,
}

/// The state of one connection.
#[derive(Debug)]
pub struct NbdConnection {
    parameters: Parameters,
    state: State,
    /// Slot `id % REQUESTS_MAX` holds the request with this id.
    pending: Vec<Option<Pending>>,
    /// Slots that are free; the last one is taken next.
    free: Vec<usize>,
    /// How many requests there have been: ids are never reused, so a late one is noticed.
    count: u64,
    inflight_bytes: u64,
}

impl NbdConnection {
    /// Begin the transmission phase.
    #[must_use]
    pub fn new(parameters: Parameters) -> NbdConnection {
        assert!(parameters.request_bytes_max <= REQUEST_BYTES_MAX, "what framing lets through");
        assert!(parameters.size_bytes.is_multiple_of(SECTOR_BYTES.into()), "whole sectors");
        NbdConnection {
            parameters,
            state: State::Open,
            pending: vec![None; REQUESTS_MAX],
            free: (0..REQUESTS_MAX).rev().collect(),
            count: 0,
            inflight_bytes: 0,
        }
    }

    /// Whether another frame may be received. False: leave the rest in the socket.
    #[must_use]
    pub fn wants_frames(&self) -> bool {
        let has_room = !self.free.is_empty() && self.inflight_bytes < INFLIGHT_BYTES_MAX;
        has_room && self.state != State::Draining
    }

    /// Serve the space by which the export has grown. The client was told the size of before, and
    /// the protocol has no word for a newer one; who learned it elsewhere is not refused.
    pub fn grow(&mut self, size_bytes: u64) {
        assert!(size_bytes.is_multiple_of(SECTOR_BYTES.into()), "whole sectors");
        self.parameters.size_bytes = self.parameters.size_bytes.max(size_bytes);
    }

    /// Data bytes of the READs and WRITEs that wait for their results.
    #[must_use]
    pub fn inflight_bytes(&self) -> u64 {
        self.inflight_bytes
    }

    /// Whether no request waits for its result.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.free.len() == REQUESTS_MAX
    }

    /// Refuse new requests with ESHUTDOWN; those under way are still answered.
    pub fn shut_down(&mut self) {
        if self.state == State::Open {
            self.state = State::Stopping;
        }
    }

    /// Judge one request. Call it only while [`NbdConnection::wants_frames`].
    ///
    /// Errors: the frame was not cut by [`NbdFraming`](super::NbdFraming); the connection ends.
    pub fn receive(&mut self, frame: Frame) -> Result<Incoming, FrameError> {
        assert!(self.wants_frames(), "the lane stops reading when there is no room");
        let request = RawRequest::parse(&frame.header)?;
        if request.command == command::DISC {
            // "There is no reply to an NBD_CMD_DISC." Its other fields change nothing about that.
            self.state = State::Draining;
            return Ok(Incoming::Disconnect);
        }
        match self.judge(&request, frame.payload) {
            Ok(Some(op)) => Ok(Incoming::Request(self.admit(&request, op))),
            Ok(None) => Ok(Incoming::Reply(self.success(&request))),
            Err((errno, text)) => Ok(Incoming::Reply(self.failure(request.cookie, errno, text))),
        }
    }

    /// Turn the result of request `id` into its reply.
    ///
    /// Shapes: a READ's data are exactly as long as the request; other data are empty.
    /// Panics if `id` is not under way: that would be a second reply.
    #[must_use]
    pub fn complete(&mut self, id: u64, result: Result<BlockData, Status>) -> OutFrame {
        let slot = (id % REQUESTS_MAX as u64) as usize;
        let pending = self.pending[slot].take_if(|pending| pending.id == id);
        let pending = pending.expect("one result for each request that was handed out");
        self.free.push(slot);
        self.inflight_bytes -= u64::from(pending.length);
        match result {
            Ok(data) if pending.is_read => self.data(&pending, data),
            Ok(data) => {
                assert!(data.is_empty(), "only a read has data");
                self.done(pending.cookie)
            }
            Err(status) => self.failure(pending.cookie, Errno::of(status), status.meaning()),
        }
    }

    /// `Ok(None)`: right, and nothing is to be done.
    fn judge(
        &self,
        request: &RawRequest,
        payload: BufList,
    ) -> Result<Option<BlockOp>, (Errno, &'static str)> {
        let RawRequest { command, offset, length, .. } = *request;
        let is_write = matches!(command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        let is_known = is_write || matches!(command, command::READ | command::FLUSH);
        if !is_known {
            // "The server SHOULD return NBD_EINVAL if it receives an unknown command."
            return Err((Errno::Einval, "unknown command"));
        }
        self.check_flags(request)?;
        if self.state == State::Stopping {
            return Err((Errno::Eshutdown, "the gateway is shutting down"));
        }
        if is_write && self.parameters.is_read_only {
            // "it SHOULD return NBD_EPERM if it receives a write or trim request on a read-only
            // export", and likewise for write zeroes.
            return Err((Errno::Eperm, "the export is read-only"));
        }
        if command == command::FLUSH {
            // "length and offset are reserved, and MUST be set to all-zero".
            return match (offset, length) {
                (0, 0) => Ok(Some(BlockOp::Flush)),
                _ => Err((Errno::Einval, "a flush has no range")),
            };
        }
        self.check_range(request)?;
        if length == 0 {
            // "the behavior of a server on such a request is unspecified although the server
            // SHOULD NOT disconnect".
            return Ok(None);
        }
        let len = u64::from(length);
        Ok(Some(match command {
            command::READ => BlockOp::Read { offset, len: length },
            // FUA needs nothing: every acknowledged write is on stable media.
            command::WRITE => BlockOp::Write { offset, data: payload },
            command::TRIM => BlockOp::Discard { offset, len },
            command::WRITE_ZEROES => {
                let keep_allocated = request.flags & FLAG_NO_HOLE != 0;
                BlockOp::WriteZeroes { offset, len, keep_allocated }
            }
            other => unreachable!("command {other} is known and not handled"),
        }))
    }

    fn check_flags(&self, request: &RawRequest) -> Result<(), (Errno, &'static str)> {
        // "NBD_CMD_FLAG_FUA": "the server MUST accept all commands with this bit set (even by
        // ignoring the bit)". DF is offered with structured replies only, and is honoured by
        // nature: a READ is answered with one chunk. FAST_ZERO is not offered: "If the server did
        // not advertise NBD_FLAG_SEND_FAST_ZERO, then it SHOULD NOT fail with NBD_ENOTSUP [...]
        // and SHOULD fail with NBD_EINVAL if the NBD_CMD_FLAG_FAST_ZERO flag was set."
        let specific = match request.command {
            command::READ if self.parameters.is_structured => FLAG_DF,
            command::WRITE_ZEROES => FLAG_NO_HOLE,
            _ => 0,
        };
        // "It also SHOULD return NBD_EINVAL if it receives a request with a flag not explicitly
        // documented as applicable to the given request."
        match request.flags & !(FLAG_FUA | specific) {
            0 => Ok(()),
            _ => Err((Errno::Einval, "a flag that the command does not have")),
        }
    }

    fn check_range(&self, request: &RawRequest) -> Result<(), (Errno, &'static str)> {
        let RawRequest { command, offset, length, .. } = *request;
        let has_data = matches!(command, command::READ | command::WRITE);
        if has_data && length > self.parameters.request_bytes_max {
            // "The server SHOULD report an NBD_EINVAL error if the client's request [...] is
            // larger than the advertised maximum block size." Without data it costs nothing.
            return Err((Errno::Einval, "longer than the maximum block size"));
        }
        if !offset.is_multiple_of(SECTOR_BYTES.into()) || !length.is_multiple_of(SECTOR_BYTES) {
            // "SHOULD return NBD_EINVAL [...] if a read or write request is not aligned to
            // advertised minimum block sizes".
            return Err((Errno::Einval, "not a multiple of 512 bytes"));
        }
        let end = offset.checked_add(length.into());
        if end.is_some_and(|end| end <= self.parameters.size_bytes) {
            return Ok(());
        }
        // "SHOULD return NBD_ENOSPC if it receives a write request including one or more sectors
        // beyond the size of the device", also for write zeroes; "NBD_EINVAL if it receives a read
        // or trim request" that does.
        match command {
            command::WRITE | command::WRITE_ZEROES => Err((Errno::Enospc, "beyond the export")),
            _ => Err((Errno::Einval, "beyond the export")),
        }
    }

    /// Give a request that is right an id and a place until its result comes.
    fn admit(&mut self, request: &RawRequest, op: BlockOp) -> BlockRequest {
        let slot = self.free.pop().expect("receive is called only when there is room");
        let id = self.count * REQUESTS_MAX as u64 + slot as u64;
        self.count += 1;
        let is_read = request.command == command::READ;
        let length = if is_read || request.command == command::WRITE { request.length } else { 0 };
        let RawRequest { cookie, offset, .. } = *request;
        let replaced = self.pending[slot].replace(Pending { id, cookie, offset, length, is_read });
        assert!(replaced.is_none(), "a free slot is empty");
        self.inflight_bytes += u64::from(length);
        BlockRequest { id, op }
    }

    /// The reply to a request that succeeded without any work: an empty range.
    fn success(&self, request: &RawRequest) -> OutFrame {
        self.done(request.cookie)
    }

    /// A successful reply without data.
    fn done(&self, cookie: u64) -> OutFrame {
        match self.parameters.is_structured {
            true => chunk(REPLY_TYPE_NONE, cookie, &[], BufList::new()),
            false => simple(0, cookie, BufList::new()),
        }
    }

    /// The reply to a READ.
    fn data(&self, pending: &Pending, data: BlockData) -> OutFrame {
        let bytes: usize = data.iter().map(|buf| buf.len()).sum();
        assert_eq!(bytes, pending.length as usize, "as many bytes as were asked for");
        match self.parameters.is_structured {
            // All data are here, so no error can come up behind the header any more: DONE.
            true => {
                chunk(REPLY_TYPE_OFFSET_DATA, pending.cookie, &pending.offset.to_be_bytes(), data)
            }
            false => simple(0, pending.cookie, data),
        }
    }

    /// A failure. "The server SHOULD prefer sending errors via a structured reply, as the error can
    /// then be accompanied by a string payload to present to a human user."
    fn failure(&self, cookie: u64, errno: Errno, text: &str) -> OutFrame {
        if !self.parameters.is_structured {
            // "it MUST NOT send any payload for this request".
            return simple(errno as u32, cookie, BufList::new());
        }
        let length = u16::try_from(text.len()).expect("our own texts are short");
        let mut fields = (errno as u32).to_be_bytes().to_vec();
        fields.extend_from_slice(&length.to_be_bytes());
        fields.extend_from_slice(text.as_bytes());
        chunk(REPLY_TYPE_ERROR, cookie, &fields, BufList::new())
    }
}

/// "Simple reply message": magic, error, cookie, data.
fn simple(error: u32, cookie: u64, payload: BufList) -> OutFrame {
    let mut frame = OutFrame { payload, ..OutFrame::default() };
    frame.head.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    frame.head.extend_from_slice(&error.to_be_bytes());
    frame.head.extend_from_slice(&cookie.to_be_bytes());
    frame
}

/// "Structured reply chunk message": magic, flags, type, cookie, length, then that many bytes.
/// Each of our replies is one chunk, so it is always the last.
fn chunk(kind: u16, cookie: u64, fields: &[u8], payload: BufList) -> OutFrame {
    let bytes: usize = payload.iter().map(|buf| buf.len()).sum();
    let length = u32::try_from(fields.len() + bytes).expect("at most 32 MiB and a few fields");
    let mut frame = OutFrame { payload, ..OutFrame::default() };
    frame.head.extend_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    frame.head.extend_from_slice(&REPLY_FLAG_DONE.to_be_bytes());
    frame.head.extend_from_slice(&kind.to_be_bytes());
    frame.head.extend_from_slice(&cookie.to_be_bytes());
    frame.head.extend_from_slice(&length.to_be_bytes());
    frame.head.extend_from_slice(fields);
    frame
}
