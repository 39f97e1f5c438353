//! The frames that wait to leave one connection.
//!
//! All frames of one loop iteration leave with one gather call, payloads uncopied; what the socket
//! does not take stays, from the exact byte. The queue is bounded: a peer that sends requests and
//! reads no replies costs its own connection, not the store's memory.

use proto::frame::OutFrame;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::io::IoSlice;

/// Pieces of one gather call: the kernel's `IOV_MAX`.
const PIECES_MAX: usize = 1024;
/// Bytes that may wait in one connection: twice what the limit of 32 MiB in flight can produce.
pub const SEND_QUEUE_BYTES_MAX: usize = 64 << 20;
/// Frames that may wait: a flood of empty replies is bounded, too.
pub const SEND_QUEUE_FRAMES_MAX: usize = 16 << 10;

#[derive(Default)]
pub(super) struct Sender {
    frames: VecDeque<OutFrame>,
    /// Bytes of the first frame that have left.
    sent: usize,
    /// Bytes that have not left.
    bytes: usize,
}

impl Sender {
    /// Put a frame behind the others; false if the queue is full.
    pub fn push(&mut self, frame: OutFrame) -> bool {
        let bytes = frame_bytes(&frame);
        assert!(bytes > 0, "an empty frame says nothing");
        if self.bytes + bytes > SEND_QUEUE_BYTES_MAX || self.frames.len() >= SEND_QUEUE_FRAMES_MAX {
            return false;
        }
        self.bytes += bytes;
        self.frames.push_back(frame);
        true
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What is to leave next, in order.
    pub fn pieces(&self) -> SmallVec<[IoSlice<'_>; 128]> {
        let mut pieces = SmallVec::new();
        let mut skip = self.sent;
        for frame in &self.frames {
            let parts =
                std::iter::once(&frame.head[..]).chain(frame.payload.iter().map(|b| &b[..]));
            for part in parts {
                if pieces.len() == PIECES_MAX {
                    return pieces;
                }
                if skip < part.len() {
                    pieces.push(IoSlice::new(&part[skip..]));
                    skip = 0;
                } else {
                    skip -= part.len();
                }
            }
        }
        pieces
    }

    /// `count` more bytes have left; how many frames that completed.
    pub fn advance(&mut self, count: usize) -> u64 {
        assert!(count <= self.bytes, "{count} bytes of {} left", self.bytes);
        self.bytes -= count;
        self.sent += count;
        let mut completed = 0;
        while let Some(frame) = self.frames.front() {
            let bytes = frame_bytes(frame);
            if self.sent < bytes {
                break;
            }
            self.sent -= bytes;
            self.frames.pop_front();
            completed += 1;
        }
        completed
    }
}

fn frame_bytes(frame: &OutFrame) -> usize {
    frame.head.len() + frame.payload.iter().map(|buf| buf.len()).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Pool;

    #[test]
    fn any_partial_write_continues_at_the_right_byte() {
        let pool = Pool::new(1 << 20);
        for seed in 1..=100u64 {
            let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let mut draw = move |below: usize| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random as usize % below
            };
            let mut sender = Sender::default();
            let mut expected = Vec::new();
            let frames = 1 + draw(20);
            for n in 0..frames {
                let mut frame = OutFrame::default();
                frame.head.extend((0..1 + draw(100)).map(|i| (n + i) as u8));
                for _ in 0..draw(4) {
                    let bytes: Vec<u8> = (0..1 + draw(5000)).map(|i| (n * 3 + i) as u8).collect();
                    frame.payload.push(pool.copy_of(&bytes).freeze());
                }
                expected.extend_from_slice(&frame.head);
                frame.payload.iter().for_each(|buf| expected.extend_from_slice(buf));
                assert!(sender.push(frame));
            }
            let mut sent = Vec::new();
            let mut completed = 0;
            while sender.bytes() > 0 {
                let all: Vec<u8> =
                    sender.pieces().iter().flat_map(|piece| piece.iter().copied()).collect();
                let count = 1 + draw(all.len());
                sent.extend_from_slice(&all[..count]);
                completed += sender.advance(count);
            }
            assert!(sent == expected, "seed {seed}");
            assert_eq!(completed, frames as u64);
            assert!(sender.pieces().is_empty());
        }
    }

    #[test]
    fn the_queue_and_the_gather_list_are_bounded() {
        let pool = Pool::new(0);
        let mut sender = Sender::default();
        let small = || OutFrame { head: SmallVec::from_slice(&[1; 16]), ..OutFrame::default() };
        for _ in 0..SEND_QUEUE_FRAMES_MAX {
            assert!(sender.push(small()));
        }
        assert!(!sender.push(small()), "too many frames");
        assert_eq!(sender.pieces().len(), PIECES_MAX);
        let mut sender = Sender::default();
        let mut large = small();
        let piece = pool.zeroed(1 << 20).freeze();
        (0..SEND_QUEUE_BYTES_MAX >> 20).for_each(|_| large.payload.push(piece.clone()));
        assert!(!sender.push(large.clone()), "16 bytes too many");
        large.payload.pop();
        assert!(sender.push(large));
    }
}
