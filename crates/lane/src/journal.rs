//! The journal ring: records are queued, framed, written, and become durable *by prefix*.
//!
//! A frame is durable when it and all earlier frames are (R2); at most two are outstanding, so the
//! frame after a torn one can tell by its `durable_seq` whether the torn one had been relied upon.
//! `stable_rec` is the largest record number up to which all data is durable in place (R4); it rides
//! in every frame and bounds what recovery must verify. Frames from the replay point on are never
//! overwritten; a checkpoint moves that point.

use crate::format::{FRAME_PAYLOAD_PAGES_MAX, FRAME_RECORD_BYTES, FrameHeader, Replay, Uuid};
use crate::mutant::Mutant;
use crate::record::{Body, Record};
use proto::checksum::{crc32c, crc32c_append};
use proto::disk::BufList;
use proto::{BLOCK_BYTES, Buf, Pool};
use std::collections::{BTreeMap, VecDeque};

/// Journal writes that may be outstanding.
const FRAMES_OUTSTANDING_MAX: u64 = 2;

/// Payload pages of one record, in a ring that is not small.
const PAYLOAD_PAGES_MAX: u32 = 16;

/// Above this share of the ring no data record is queued: CONF, COMMIT and RESOLVE must still fit.
const DATA_STOP_PERCENT: u64 = 85;

/// Who waits for a record to be durable; the lane decides what the bits mean.
pub type Owner = u64;

struct Queued {
    record: u64,
    bytes: u32,
    payload: u32,
    owner: Owner,
}

struct Frame {
    seq: u64,
    ring_page: u32,
    prev_crc: u32,
    pages: u32,
    last_record: u64,
    written: bool,
    owners: Vec<(u64, Owner)>,
}

/// A frame to be written at `ring_page`.
pub struct FrameWrite {
    /// Its sequence number, for `durable`.
    pub seq: u64,
    /// Where it goes.
    pub ring_page: u32,
    /// Header page, then payload.
    pub data: BufList,
}

/// Where a journal goes on after recovery, or starts after formatting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JournalStart {
    /// The replay point of the superblock: frames from here on must survive.
    pub replay: Replay,
    /// Next frame.
    pub next: Replay,
    /// Number of the last record.
    pub last_record: u64,
    /// Stable as the superblock and the frames say.
    pub stable_record: u64,
    /// This mount's nonce.
    pub nonce: u64,
}

/// The ring and its queue.
pub struct Journal {
    lane_uuid: Uuid,
    ring_pages: u32,
    nonce: u64,
    next: Replay,
    next_record: u64,
    durable_seq: u64,
    /// Frames from the replay point on, oldest first.
    frames: VecDeque<Frame>,
    used_pages: u32,
    queue: VecDeque<Queued>,
    queued_bytes: Vec<u8>,
    queued_payload: VecDeque<(Buf, u32)>,
    stable: u64,
    /// How often `done` is still to be said of each record after `stable`.
    done: VecDeque<u32>,
    /// Until this record is stable the ring may be filled to the brim: the records that make it
    /// stable must fit.
    urgent: u64,
    /// While recovery's RESOLVE is not durable, frames carry this older value.
    stable_hold: Option<u64>,
    sealed: bool,
    mutant: Mutant,
}

impl Journal {
    /// Go on at `start`. `replayed`: frames between the replay point and `start.next`, as
    /// (seq, ring page, prev_crc, pages, last record).
    #[must_use]
    pub fn new(
        lane_uuid: Uuid,
        ring_pages: u32,
        start: JournalStart,
        replayed: &[(Replay, u32, u64)],
        mutant: Mutant,
    ) -> Journal {
        let frames: VecDeque<Frame> = replayed
            .iter()
            .map(|&(at, pages, last_record)| Frame {
                seq: at.frame_seq,
                ring_page: at.ring_page,
                prev_crc: at.prev_crc,
                pages,
                last_record,
                written: true,
                owners: Vec::new(),
            })
            .collect();
        let used_pages = frames.iter().map(|frame| frame.pages).sum();
        Journal {
            lane_uuid,
            ring_pages,
            nonce: start.nonce,
            next: start.next,
            next_record: start.last_record + 1,
            durable_seq: start.next.frame_seq - 1,
            frames,
            used_pages,
            queue: VecDeque::new(),
            queued_bytes: Vec::new(),
            queued_payload: VecDeque::new(),
            stable: start.last_record,
            done: VecDeque::new(),
            urgent: 0,
            stable_hold: Some(start.stable_record),
            sealed: true,
            mutant,
        }
    }

    /// Queue a record; `payload` are its blocks with their plain CRC32C. Returns its number.
    pub fn append(
        &mut self,
        record: &Record,
        payload: impl Iterator<Item = (Buf, u32)>,
        owner: Owner,
    ) -> u64 {
        let (bytes, blocks) = (self.queued_bytes.len(), self.queued_payload.len());
        record.encode(&mut self.queued_bytes);
        self.queued_payload.extend(payload);
        let payload = (self.queued_payload.len() - blocks) as u32;
        assert_eq!(payload as usize, record.payload_pages(), "payload of the record");
        let number = self.next_record;
        self.next_record += 1;
        let bytes = (self.queued_bytes.len() - bytes) as u32;
        self.queue.push_back(Queued { record: number, bytes, payload, owner });
        self.done.push_back(1);
        self.sealed = matches!(record.body, Body::Seal);
        number
    }

    /// Records queued and not framed yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Share of the ring in use or spoken for, in percent.
    #[must_use]
    pub fn fill_percent(&self) -> u32 {
        let queued =
            self.queued_bytes.len().div_ceil(FRAME_RECORD_BYTES) + self.queued_payload.len();
        ((u64::from(self.used_pages) + queued as u64) * 100 / u64::from(self.ring_pages)) as u32
    }

    /// True when a data record of `pages` (with its frame) may be queued: all that is queued fits
    /// below the mark where data stops, so control records behind it can always be written.
    #[must_use]
    pub fn has_room_for_data(&self, pages: u32) -> bool {
        let queued =
            self.queued_bytes.len().div_ceil(FRAME_RECORD_BYTES / 2) + self.queued_payload.len();
        let spoken_for = u64::from(self.used_pages) + queued as u64 + u64::from(pages);
        // A record whose payload does not fit before the ring's end leaves what is there empty.
        let before = u64::from(self.next.ring_page) + queued as u64 + u64::from(pages);
        let skipped = if before > u64::from(self.ring_pages) { self.payload_max() } else { 0 };
        let spoken_for = spoken_for + u64::from(skipped);
        spoken_for * 100 <= u64::from(self.ring_pages) * DATA_STOP_PERCENT
    }

    /// Most payload pages of one record: it must fit beside others even in a small ring.
    #[must_use]
    pub fn payload_max(&self) -> u32 {
        (self.ring_pages / 8).clamp(1, PAYLOAD_PAGES_MAX)
    }

    /// Records since the replay point.
    #[must_use]
    pub fn records_held(&self) -> u64 {
        self.frames.front().map_or(0, |frame| self.next_record.saturating_sub(frame.last_record))
    }

    /// One line about the ring, for `Lane::describe`.
    #[must_use]
    pub fn describe(&self) -> String {
        let ends = |frame: &Frame| (frame.seq, frame.pages, frame.last_record);
        format!(
            "{} of {} pages in frames {:?}..{:?}, next at page {}, durable {}, stable {}, {} queued",
            self.used_pages,
            self.ring_pages,
            self.frames.front().map(ends),
            self.frames.back().map(ends),
            self.next.ring_page,
            self.durable_seq,
            self.stable,
            self.queue.len()
        )
    }

    /// True when everything queued is durable and every record is stable.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.durable_seq + 1 == self.next.frame_seq && self.done.is_empty()
    }

    /// True when no record follows the last SEAL or MOUNT.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Build the next frame, if one may be written now.
    pub fn build(&mut self, pool: &Pool) -> Option<FrameWrite> {
        let outstanding = self.next.frame_seq - self.durable_seq - 1;
        if self.queue.is_empty() || outstanding >= FRAMES_OUTSTANDING_MAX {
            return None;
        }
        let to_end = self.ring_pages - self.next.ring_page;
        let first = self.queue.front().expect("not empty");
        if first.payload + 1 > to_end {
            return self.build_pad(pool, to_end);
        }
        let room = to_end.min(self.usable_pages().saturating_sub(self.used_pages));
        if first.payload + 1 > room {
            return None;
        }
        let (mut count, mut bytes, mut payload) = (0, 0usize, 0u32);
        for queued in &self.queue {
            let pages = payload + queued.payload;
            if bytes + queued.bytes as usize > FRAME_RECORD_BYTES
                || pages as usize > FRAME_PAYLOAD_PAGES_MAX
                || pages + 1 > room
            {
                break;
            }
            (count, bytes, payload) = (count + 1, bytes + queued.bytes as usize, pages);
        }
        let first_record = first.record;
        let queued: Vec<Queued> = self.queue.drain(..count).collect();
        let (mut data, mut payload_crc) = (BufList::new(), 0);
        for (buf, crc) in self.queued_payload.drain(..payload as usize) {
            payload_crc = crc32c_append(payload_crc, &crc.to_le_bytes());
            data.push(buf);
        }
        let owners = queued.iter().map(|queued| (queued.record, queued.owner)).collect();
        let records: Vec<u8> = self.queued_bytes.drain(..bytes).collect();
        let shape = (first_record, count as u16, payload as u16, payload_crc);
        Some(self.write_frame(pool, shape, &records, data, owners))
    }

    /// Pages that frames may fill now: the rest is kept for the next recovery's decisions.
    fn usable_pages(&self) -> u32 {
        let recovering = self.stable_hold.is_some() || self.stable < self.urgent;
        if recovering { self.ring_pages } else { self.ring_pages - (self.ring_pages / 8).max(2) }
    }

    /// True when `records` surely fit into the ring as it is.
    #[must_use]
    pub fn has_room_for(&self, records: &[Record]) -> bool {
        let mut bytes = Vec::new();
        records.iter().for_each(|record| record.encode(&mut bytes));
        // A frame is at least half full unless it is the last; one page more for a PAD.
        let frames = bytes.len().div_ceil(FRAME_RECORD_BYTES / 2) as u32 + 2;
        self.used_pages + frames <= self.ring_pages
    }

    /// Replayed records whose data is not in place after all, each with the number of times that
    /// `done` will be said of it.
    pub fn reopen(&mut self, records: &BTreeMap<u64, u32>) {
        let Some((&first, _)) = records.first_key_value() else { return };
        self.urgent = self.stable;
        self.done = (first..=self.stable).map(|n| records.get(&n).copied().unwrap_or(0)).collect();
        self.stable = first - 1;
    }

    /// Until all records queued so far are stable, frames may take the room that is kept for the
    /// next recovery: the record queued last is what makes the others stable.
    pub fn hurry(&mut self) {
        self.urgent = self.next_record - 1;
    }

    /// A frame that only skips to the end of the ring.
    fn build_pad(&mut self, pool: &Pool, to_end: u32) -> Option<FrameWrite> {
        if self.used_pages + to_end > self.usable_pages() {
            return None;
        }
        let mut records = Vec::new();
        Record::of_lane(Body::Pad).encode(&mut records);
        // The record has no number of its own: it carries the number that comes next and counts 0.
        let shape = (self.queue[0].record, 0, (to_end - 1) as u16, 0);
        Some(self.write_frame(pool, shape, &records, BufList::new(), Vec::new()))
    }

    fn write_frame(
        &mut self,
        pool: &Pool,
        (first_rec, rec_count, payload_pages, payload_crc): (u64, u16, u16, u32),
        records: &[u8],
        payload: BufList,
        owners: Vec<(u64, Owner)>,
    ) -> FrameWrite {
        let header = FrameHeader {
            mount_nonce: self.nonce,
            frame_seq: self.next.frame_seq,
            prev_crc: self.next.prev_crc,
            ring_page: self.next.ring_page,
            first_rec,
            rec_count,
            payload_pages,
            payload_crc,
            durable_seq: self.durable_seq,
            stable_rec: self.stable_hold.unwrap_or(self.stable),
        };
        let mut page = pool.alloc(BLOCK_BYTES);
        let crc = header.encode(&self.lane_uuid, records, &mut page);
        let mut data = BufList::new();
        data.push(page.freeze());
        data.extend(payload);
        let pages = 1 + u32::from(payload_pages);
        self.frames.push_back(Frame {
            seq: self.next.frame_seq,
            ring_page: self.next.ring_page,
            prev_crc: self.next.prev_crc,
            pages,
            last_record: first_rec + u64::from(rec_count) - 1,
            written: false,
            owners,
        });
        self.used_pages += pages;
        let write = FrameWrite { seq: self.next.frame_seq, ring_page: self.next.ring_page, data };
        self.next = Replay {
            ring_page: (self.next.ring_page + pages) % self.ring_pages,
            frame_seq: self.next.frame_seq + 1,
            prev_crc: crc,
        };
        write
    }

    /// Frame `seq` is written (and flushed, where that is needed): append to `out` the records that
    /// are durable now, in order.
    pub fn durable(&mut self, seq: u64, out: &mut Vec<(u64, Owner)>) {
        if let Some(frame) = self.frames.iter_mut().find(|frame| frame.seq == seq) {
            frame.written = true;
            if self.mutant.is(Mutant::AckWithoutPrefix) {
                out.append(&mut frame.owners);
            }
        }
        let before = self.durable_seq;
        for frame in self.frames.iter_mut().filter(|frame| frame.seq > before) {
            if !frame.written {
                break;
            }
            self.durable_seq = frame.seq;
            out.append(&mut frame.owners);
        }
    }

    /// The data of a record is durable in place (or it has none).
    pub fn done(&mut self, record: u64) {
        assert!(record > self.stable, "record {record} is stable already");
        let left = &mut self.done[(record - self.stable - 1) as usize];
        assert!(*left > 0, "record {record} done twice");
        *left -= 1;
        while self.done.front() == Some(&0) {
            self.done.pop_front();
            self.stable += 1;
        }
    }

    /// Largest record number up to which everything is in place.
    #[must_use]
    pub fn stable(&self) -> u64 {
        self.stable_hold.unwrap_or(self.stable)
    }

    /// Recovery's decisions are durable: the window before them needs no verification any more.
    pub fn release_hold(&mut self) {
        self.stable_hold = None;
    }

    /// Where replay must begin for a checkpoint taken now: the frame of record stable + 1.
    #[must_use]
    pub fn replay_point(&self) -> Replay {
        let stable = self.stable();
        // A frame still being written is never given up, not even a PAD without records.
        let needed = |frame: &&Frame| frame.last_record > stable || frame.seq > self.durable_seq;
        self.frames.iter().find(needed).map_or(self.next, |frame| Replay {
            ring_page: frame.ring_page,
            frame_seq: frame.seq,
            prev_crc: frame.prev_crc,
        })
    }

    /// A checkpoint with this replay point is durable: earlier frames may be overwritten.
    pub fn advance(&mut self, replay: Replay) {
        while self.frames.front().is_some_and(|frame| frame.seq < replay.frame_seq) {
            let frame = self.frames.pop_front().expect("just looked at");
            assert!(frame.owners.is_empty(), "a frame with waiters is not stable");
            self.used_pages -= frame.pages;
        }
    }
}

/// CRC over the CRCs of payload pages, as stored in a frame header.
#[must_use]
pub fn payload_crc(payload: &[u8]) -> u32 {
    payload
        .chunks_exact(BLOCK_BYTES)
        .fold(0, |crc, page| crc32c_append(crc, &crc32c(page).to_le_bytes()))
}
