//! Cutting a byte stream into frames, with payloads received where they will be used.
//!
//! Bytes arrive in one gather call: `[rest of the meta][rest of a payload chunk][read-ahead]`. So a
//! large payload goes from the socket into its aligned buffer with one copy, by the kernel, and the
//! next header comes along in the same call. Small frames arrive many at a time in the read-ahead
//! buffer, and their payloads are copied out: at 4 KiB the copy costs a tenth of the system call
//! that it saves. The read-ahead window follows the traffic: it doubles when a call fills it and
//! falls back when a large payload comes, so that large payloads stay uncopied.
//!
//! Nothing is allocated for a body before the framing has accepted its header, and payload buffers
//! are taken chunk by chunk as bytes come in: who announces 32 MiB and sends none gets 1 MiB.

use proto::buffer::{BufMut, Pool};
use proto::frame::{BodyLayout, Frame, FrameError, Framing};
use proto::frame::{HEADER_BYTES_MAX, PAYLOAD_CHUNK_BYTES};
use std::io::IoSliceMut;

/// Read-ahead of a fresh connection.
const AHEAD_START: usize = 16 << 10;
/// Largest read-ahead: more than 32 writes of 4 KiB.
const AHEAD_MAX: usize = 256 << 10;
/// Read-ahead beside large payloads: the next headers and little else.
const AHEAD_BESIDE_LARGE: usize = 4 << 10;
/// A payload from which on a copy costs more than a system call.
const PAYLOAD_LARGE: usize = 32 << 10;
/// Pieces of one gather call: meta, payload chunk, read-ahead.
const PIECES: usize = 3;

pub(super) struct Receiver {
    framing: Box<dyn Framing>,
    header_bytes: usize,
    /// Bytes `start..end` of it are received and not yet used.
    ahead: Vec<u8>,
    start: usize,
    end: usize,
    window: usize,
    body: Option<Body>,
}

struct Body {
    frame: Frame,
    meta_filled: usize,
    /// The chunk being filled, and how far.
    chunk: Option<(BufMut, usize)>,
    /// Payload bytes for which no chunk was taken yet.
    payload_left: usize,
}

impl Receiver {
    /// Start with bytes that somebody else has received already.
    pub fn new(framing: Box<dyn Framing>, leftover: &[u8]) -> Receiver {
        let header_bytes = framing.header_bytes();
        assert!((1..=HEADER_BYTES_MAX).contains(&header_bytes), "header of {header_bytes} bytes");
        let mut ahead = leftover.to_vec();
        ahead.resize(AHEAD_START.max(leftover.len()), 0);
        let window = AHEAD_START;
        Receiver { framing, header_bytes, ahead, start: 0, end: leftover.len(), window, body: None }
    }

    /// Bytes received that are no complete frame yet; 0 between frames.
    pub fn is_inside_frame(&self) -> bool {
        self.body.is_some() || self.start < self.end
    }

    /// Whether a header was taken whose body has not come.
    pub fn is_inside_body(&self) -> bool {
        self.body.is_some()
    }

    /// Bytes received and not used.
    pub fn into_leftover(mut self) -> Vec<u8> {
        self.ahead.truncate(self.end);
        self.ahead.split_off(self.start)
    }

    /// Cut the next frame out of what was received.
    pub fn next(&mut self, pool: &Pool) -> Result<Option<Frame>, FrameError> {
        if self.body.is_none() && !self.take_header()? {
            return Ok(None);
        }
        let body = self.body.as_mut().expect("take_header has just made it");
        let used = body.copy_in(&self.ahead[self.start..self.end], pool);
        self.start += used;
        if !body.is_complete() {
            return Ok(None);
        }
        Ok(self.body.take().map(|body| body.frame))
    }

    fn take_header(&mut self) -> Result<bool, FrameError> {
        if self.end - self.start < self.header_bytes {
            return Ok(false);
        }
        let header = &self.ahead[self.start..self.start + self.header_bytes];
        let layout = self.framing.body(header)?;
        self.body = Some(Body::new(header, layout));
        self.start += self.header_bytes;
        if layout.payload_bytes as usize >= PAYLOAD_LARGE {
            self.window = AHEAD_BESIDE_LARGE;
        }
        Ok(true)
    }

    /// Where the next bytes of the stream go, in order. Only called when `next` had no frame.
    pub fn room<'a>(&'a mut self, pool: &Pool) -> Room<'a> {
        self.ahead.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        assert!(self.body.is_none() || self.end == 0, "a body has taken all that came ahead");
        assert!(self.end < self.header_bytes, "a complete header would have been taken");
        if self.ahead.len() < self.window {
            self.ahead.resize(self.window, 0);
        }
        let mut room = Room { pieces: Default::default(), count: 0, bytes: 0 };
        let mut is_last = true;
        if let Some(body) = &mut self.body {
            is_last = body.offer(&mut room, pool);
        }
        if is_last {
            room.add(&mut self.ahead[self.end..self.window.max(self.header_bytes)]);
        }
        room
    }

    /// `count` bytes came into the room; `filled` says that the room was full.
    pub fn received(&mut self, count: usize, filled: bool) {
        let in_body = self.body.as_mut().map_or(0, |body| body.advance(count));
        self.end += count - in_body;
        if filled && self.end == self.window {
            self.window = (2 * self.window).min(AHEAD_MAX);
        }
    }
}

impl Body {
    fn new(header: &[u8], layout: BodyLayout) -> Body {
        let mut frame = Frame::default();
        frame.header.extend_from_slice(header);
        frame.meta.resize(layout.meta_bytes as usize, 0);
        let payload_left = layout.payload_bytes as usize;
        Body { frame, meta_filled: 0, chunk: None, payload_left }
    }

    fn is_complete(&self) -> bool {
        self.meta_filled == self.frame.meta.len() && self.chunk.is_none() && self.payload_left == 0
    }

    /// Fill from bytes that came ahead; how many were used.
    fn copy_in(&mut self, bytes: &[u8], pool: &Pool) -> usize {
        let in_meta = bytes.len().min(self.frame.meta.len() - self.meta_filled);
        self.frame.meta[self.meta_filled..][..in_meta].copy_from_slice(&bytes[..in_meta]);
        self.meta_filled += in_meta;
        let mut used = in_meta;
        while used < bytes.len() && self.has_chunk(pool) {
            let (chunk, filled) = self.chunk.as_mut().expect("has_chunk said so");
            let count = (bytes.len() - used).min(chunk.len() - *filled);
            chunk[*filled..][..count].copy_from_slice(&bytes[used..][..count]);
            *filled += count;
            used += count;
            self.finish_chunk();
        }
        used
    }

    /// Take a chunk if payload is missing and none is there; false if none is missing.
    fn has_chunk(&mut self, pool: &Pool) -> bool {
        if self.chunk.is_none() && self.payload_left > 0 {
            let len = self.payload_left.min(PAYLOAD_CHUNK_BYTES);
            self.payload_left -= len;
            self.chunk = Some((pool.alloc(len), 0));
        }
        self.chunk.is_some()
    }

    fn finish_chunk(&mut self) {
        if self.chunk.as_ref().is_some_and(|(chunk, filled)| *filled == chunk.len()) {
            let (chunk, _) = self.chunk.take().expect("just looked at");
            self.frame.payload.push(chunk.freeze());
        }
    }

    /// Offer what is missing; true if the rest of the body fits, so that read-ahead may follow.
    fn offer<'a>(&'a mut self, room: &mut Room<'a>, pool: &Pool) -> bool {
        let _ = self.has_chunk(pool);
        if self.meta_filled < self.frame.meta.len() {
            room.add(&mut self.frame.meta[self.meta_filled..]);
        }
        if let Some((chunk, filled)) = &mut self.chunk {
            room.add(&mut chunk[*filled..]);
        }
        self.payload_left == 0
    }

    /// Bytes came into the pieces of `offer`; how many of `count` were ours.
    fn advance(&mut self, count: usize) -> usize {
        let in_meta = count.min(self.frame.meta.len() - self.meta_filled);
        self.meta_filled += in_meta;
        let mut used = in_meta;
        if let Some((chunk, filled)) = &mut self.chunk {
            let in_chunk = (count - used).min(chunk.len() - *filled);
            *filled += in_chunk;
            used += in_chunk;
        }
        self.finish_chunk();
        used
    }
}

/// Memory for one gather call.
#[derive(Default)]
pub(super) struct Room<'a> {
    pieces: [Option<IoSliceMut<'a>>; PIECES],
    count: usize,
    bytes: usize,
}

impl<'a> Room<'a> {
    fn add(&mut self, piece: &'a mut [u8]) {
        self.bytes += piece.len();
        self.pieces[self.count] = Some(IoSliceMut::new(piece));
        self.count += 1;
    }

    /// Sum of all pieces.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Call `fill` with the pieces.
    pub fn fill<R>(self, fill: impl FnOnce(&mut [IoSliceMut<'a>]) -> R) -> R {
        let count = self.count;
        let mut pieces = self.pieces.map(|piece| piece.unwrap_or_else(|| IoSliceMut::new(&mut [])));
        fill(&mut pieces[..count])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::testing::{TestFraming, frame_bytes};

    /// Deliver `stream` in pieces whose sizes `next_size` chooses, as a socket would.
    fn cut(stream: &[u8], mut next_size: impl FnMut() -> usize) -> Vec<Frame> {
        let pool = Pool::new(8 << 20);
        let mut receiver = Receiver::new(Box::new(TestFraming), &[]);
        let mut frames = Vec::new();
        let mut at = 0;
        loop {
            while let Some(frame) = receiver.next(&pool).expect("well-formed") {
                frames.push(frame);
            }
            if at == stream.len() {
                break;
            }
            let room = receiver.room(&pool);
            let bytes = room.bytes();
            let count = next_size().clamp(1, bytes).min(stream.len() - at);
            room.fill(|pieces| {
                let mut rest = &stream[at..at + count];
                for piece in pieces {
                    let (head, tail) = rest.split_at(rest.len().min(piece.len()));
                    piece[..head.len()].copy_from_slice(head);
                    rest = tail;
                }
                assert!(rest.is_empty());
            });
            at += count;
            receiver.received(count, count == bytes);
        }
        assert!(!receiver.is_inside_frame());
        frames
    }

    #[test]
    fn any_split_gives_the_same_frames() {
        for seed in 1..=200u64 {
            let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let mut draw = move || {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random as usize
            };
            let mut stream = Vec::new();
            let mut sizes = Vec::new();
            for _ in 0..draw() % 30 {
                let meta = [0, 4, 40, 300][draw() % 4];
                let payload = [0, 1, 512, 4096, 4096, 65536, 3 << 20][draw() % 7];
                sizes.push((meta, payload));
                stream.extend(frame_bytes(sizes.len() as u32, meta, payload));
            }
            let largest = [1 << 30, 100_000, 5000, 61][draw() % 4];
            // Byte by byte through megabytes proves nothing more and takes long.
            let smallest = if stream.len() > 100_000 { 50 } else { 1 };
            let frames = cut(&stream, || smallest + draw() % largest);
            assert_eq!(frames.len(), sizes.len(), "seed {seed}");
            let mut again = Vec::new();
            for (frame, (meta, payload)) in frames.iter().zip(&sizes) {
                assert_eq!(frame.meta.len(), *meta, "seed {seed}");
                let total: usize = frame.payload.iter().map(|chunk| chunk.len()).sum();
                assert_eq!(total, *payload, "seed {seed}");
                for (index, chunk) in frame.payload.iter().enumerate() {
                    assert_eq!(chunk.as_ptr() as usize % 4096, 0, "aligned");
                    let is_last = index + 1 == frame.payload.len();
                    assert!(is_last || chunk.len() == PAYLOAD_CHUNK_BYTES, "full but the last");
                }
                again.extend_from_slice(&frame.header);
                again.extend_from_slice(&frame.meta);
                frame.payload.iter().for_each(|chunk| again.extend_from_slice(chunk));
            }
            assert!(again == stream, "seed {seed}");
        }
    }

    #[test]
    fn an_announced_payload_takes_no_memory_before_it_comes() {
        let pool = Pool::new(0);
        let mut receiver = Receiver::new(Box::new(TestFraming), &[]);
        let stream = frame_bytes(1, 0, 32 << 20);
        let mut receiver_room = receiver.room(&pool);
        receiver_room.pieces[0].as_mut().expect("read-ahead")[..16].copy_from_slice(&stream[..16]);
        receiver.received(16, false);
        assert!(receiver.next(&pool).expect("well-formed").is_none());
        let body = receiver.body.as_ref().expect("inside the body");
        assert!(body.chunk.is_none() && body.payload_left == 32 << 20);
        assert_eq!(receiver.room(&pool).bytes(), PAYLOAD_CHUNK_BYTES, "one chunk, nothing ahead");
    }

    #[test]
    fn the_window_follows_the_traffic() {
        let pool = Pool::new(0);
        let mut receiver = Receiver::new(Box::new(TestFraming), &[]);
        assert_eq!(receiver.room(&pool).bytes(), AHEAD_START);
        for expected in [32 << 10, 64 << 10, 128 << 10, AHEAD_MAX, AHEAD_MAX] {
            let bytes = receiver.room(&pool).bytes();
            receiver.received(bytes, true);
            receiver.start = receiver.end;
            assert_eq!(receiver.window, expected);
        }
        let large = frame_bytes(1, 0, 1 << 20);
        receiver.room(&pool);
        receiver.ahead[..16].copy_from_slice(&large[..16]);
        receiver.received(16, false);
        assert!(receiver.next(&pool).expect("well-formed").is_none());
        assert_eq!(receiver.room(&pool).bytes(), (1 << 20) + AHEAD_BESIDE_LARGE);
    }
}
