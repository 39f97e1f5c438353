//! One message of every opcode and direction, and of every variant that has bytes of its own.
//! The golden bytes, the round trips and the rejection tests all start here.

use super::*;
use crate::disk::BufList;
use crate::{Epoch, Lsn, Pool, Seq, ShardId, VolumeId};

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Sample {
    Request(Request),
    Reply(Reply),
}

impl Sample {
    pub(super) fn bytes(&self) -> Vec<u8> {
        let frame = match self {
            Sample::Request(request) => request.encode(),
            Sample::Reply(reply) => reply.encode(),
        };
        let mut bytes = frame.head.to_vec();
        frame.payload.iter().for_each(|buf| bytes.extend_from_slice(buf));
        bytes
    }
}

/// Data of which byte i is `first + 7 i`, cut into buffers of at most 4,096 bytes.
pub(super) fn pattern(first: u8, len: usize) -> BufList {
    let pool = Pool::new(0);
    let bytes: Vec<u8> = (0..len).map(|i| first.wrapping_add((7 * i) as u8)).collect();
    bytes.chunks(4096).map(|part| pool.copy_of(part).freeze()).collect()
}

fn lsn(epoch: u64, seq: u64) -> Lsn {
    Lsn { epoch: Epoch(epoch), seq: Seq(seq) }
}

fn range(offset: u64, length: u32) -> ByteRange {
    ByteRange::new(offset, length).expect("samples are right")
}

fn written(first: u8, offset: u64, len: usize) -> RangeData {
    RangeData::compute(offset, pattern(first, len)).expect("samples are right")
}

fn peer_context() -> PeerContext {
    PeerContext {
        lsn: lsn(6, 1_000_001),
        commit_lsn: lsn(5, 1_000_000),
        snap_seq: 4,
        incarnation: 0x1122_3344_5566_7788,
        history_id: 99,
    }
}

fn requests() -> Vec<(&'static str, RequestOp)> {
    let peer = peer_context();
    let who = Who::Client(SignedTicket {
        ticket: Ticket {
            volume: VolumeId(77),
            attach_epoch: 3,
            session: 0xabcd,
            expires: 1_800_000_000,
            rights: Rights::READ_WRITE,
        },
        mac: [0x5a; 32],
    });
    let hello = |who| {
        Box::new(Hello {
            versions: VersionRange::OWN,
            features: 0x8000_0000_0000_0001,
            lane: 2,
            path: PathSlot { slot: 1, generation: 9 },
            limits: Limits::DEFAULT,
            cluster_id: *b"cluster-id-16-by",
            who,
        })
    };
    let store = Peer { store: 12, incarnation: 34, nonce: [1; 32], proof: [2; 32] };
    let entry = |kind| HeartbeatEntry {
        shard: ShardId { volume: VolumeId(77), index: 5 },
        epoch: Epoch(7),
        kind,
    };
    let prepare = |op| RequestOp::Prepare(Box::new(Prepare { peer, op }));
    let settle = |content| RequestOp::Settle(Box::new(Settle { peer, layer_snap_seq: 3, content }));
    let copy = |is_last, content| {
        RequestOp::Copy(Box::new(Copy { peer, resync_id: 8, layer_snap_seq: 3, is_last, content }))
    };
    let snap = |action, target_snap_seq| {
        RequestOp::Snap(Snap { peer, cut_id: 21, target_snap_seq, action })
    };
    vec![
        ("hello_client", RequestOp::Hello(hello(who))),
        ("hello_peer", RequestOp::Hello(hello(Who::Peer(store)))),
        ("hello_heartbeat", RequestOp::Hello(hello(Who::Heartbeat(store)))),
        ("fence_path", RequestOp::FencePath { slot: 3, generation: 41 }),
        ("ping_client", RequestOp::Ping(Ping { sequence: 1, ..Ping::default() })),
        (
            "ping_heartbeat",
            RequestOp::Ping(Ping {
                sequence: 500,
                base_sequence: 499,
                store: 12,
                incarnation: 34,
                peer_incarnation: 35,
                term: 6,
                lineage: 0xfeed,
                revision: 1234,
                entries: vec![
                    entry(HeartbeatKind::Lease),
                    entry(HeartbeatKind::Drop),
                    entry(HeartbeatKind::Release),
                ],
            }),
        ),
        ("read", RequestOp::Read { range: range(8192 + 512, 4096), snap_seq: None }),
        ("read_snapshot", RequestOp::Read { range: range(1 << 30, 1 << 20), snap_seq: Some(3) }),
        ("write_block", RequestOp::Write(written(1, 1 << 34, 4096))),
        ("write_fragments", RequestOp::Write(written(2, 4096 - 512, 512 + 4096 + 1024))),
        ("flush", RequestOp::Flush),
        ("discard", RequestOp::Discard(range(512, RANGE_BYTES_MAX))),
        (
            "write_zeroes",
            RequestOp::WriteZeroes { range: range(4096, 1 << 20), is_kept_allocated: true },
        ),
        (
            "compare_and_write",
            RequestOp::CompareAndWrite {
                compare: CheckedData::compute(1024, pattern(3, 512)),
                write: written(4, 8192 + 1024, 512),
                acked_upto: 17,
            },
        ),
        ("prepare_write", prepare(PrepareOp::Write(written(5, 65536, 8192)))),
        ("prepare_discard", prepare(PrepareOp::Discard(range(65536, 1 << 20)))),
        (
            "prepare_write_zeroes",
            prepare(PrepareOp::WriteZeroes { range: range(0, 4096), is_kept_allocated: true }),
        ),
        (
            "prepare_compare_and_write",
            prepare(PrepareOp::CompareAndWrite {
                session: 0xabcd,
                session_command: 18,
                acked_upto: 17,
                data: written(6, 4096, 4096),
            }),
        ),
        ("settle_data", settle(Content::Data(written(7, 4096, 4096)))),
        ("settle_inherit", settle(Content::Inherit(range(4096, 8192)))),
        ("settle_poison", settle(Content::Poison(range(4096, 4096)))),
        ("tails", RequestOp::Tails(peer)),
        ("copy_data", copy(true, Content::Data(written(8, 1 << 20, 4096)))),
        ("copy_zero", copy(false, Content::Zero(range(1 << 20, 1 << 20)))),
        (
            "digest",
            RequestOp::Digest(Digest {
                peer,
                resync_id: 8,
                layer_snap_seq: 3,
                first_region: 16,
                region_count: 2,
            }),
        ),
        ("snap_hold", snap(SnapAction::Hold, 0)),
        ("snap_seal", snap(SnapAction::Seal, 5)),
        ("snap_release", snap(SnapAction::Release, 0)),
        ("snap_delete", snap(SnapAction::Delete, 2)),
        ("attach_advance", RequestOp::Attach(peer, AttachOp::Advance { attach_epoch: 4 })),
        (
            "attach_block",
            RequestOp::Attach(
                peer,
                AttachOp::Block { client: 55, session: 66, until: 1_900_000_000 },
            ),
        ),
        ("need_conf", RequestOp::NeedConf(peer)),
    ]
}

fn replies() -> Vec<(&'static str, Result<ReplyOp, Failure>)> {
    let ack =
        Ack { incarnation: 7, history_id: 99, lsn_epoch: Epoch(6), resync_id: 8, credit: 1 << 33 };
    let tails = Tails {
        ack,
        complete_lsn: lsn(5, 999_999),
        snap_seq: 4,
        records: vec![
            TailRecord {
                lsn: lsn(5, 1_000_001),
                range: range(4096, 4096),
                snap_seq: 4,
                op: TailOp::Write,
                state: BlockState::Data,
            },
            TailRecord {
                lsn: lsn(5, 1_000_002),
                range: range(8192, 65536),
                snap_seq: 4,
                op: TailOp::Discard,
                state: BlockState::Inherit,
            },
        ],
        results: vec![ResultRecord {
            session: 0xabcd,
            session_command: 18,
            lsn: lsn(5, 1_000_001),
            outcome: CompareOutcome::Different { at: 3 },
        }],
    };
    let refused = |opcode, status, detail| Err(Failure { opcode, status, detail });
    vec![
        (
            "hello",
            Ok(ReplyOp::Hello(Box::new(HelloReply {
                version: VERSION,
                features: 1,
                lanes: 4,
                limits: Limits::DEFAULT,
                peer: Peer { store: 12, incarnation: 34, nonce: [3; 32], proof: [4; 32] },
            }))),
        ),
        (
            "fence_path",
            Ok(ReplyOp::FencePath(vec![FenceOutcome {
                command_id: 71,
                lsn: lsn(6, 1_000_001),
                status: crate::Status::MediaError,
                detail: 5,
            }])),
        ),
        (
            "ping",
            Ok(ReplyOp::Ping(Ping {
                sequence: 500,
                entries: vec![HeartbeatEntry {
                    shard: ShardId { volume: VolumeId(77), index: 5 },
                    epoch: Epoch(8),
                    kind: HeartbeatKind::Refused,
                }],
                ..Ping::default()
            })),
        ),
        ("read", Ok(ReplyOp::Read(CheckedData::compute(512, pattern(9, 4096))))),
        ("read_failed", refused(Opcode::Read, crate::Status::MediaError, 0)),
        ("write", Ok(ReplyOp::Write)),
        ("write_refused", refused(Opcode::Write, crate::Status::StaleEpoch, 3)),
        ("flush", Ok(ReplyOp::Flush)),
        ("discard", Ok(ReplyOp::Discard)),
        ("write_zeroes", Ok(ReplyOp::WriteZeroes)),
        ("compare_and_write", Ok(ReplyOp::CompareAndWrite(CompareOutcome::Written))),
        (
            "compare_and_write_different",
            Ok(ReplyOp::CompareAndWrite(CompareOutcome::Different { at: 511 })),
        ),
        ("prepare", Ok(ReplyOp::Prepare(ack))),
        ("prepare_refused", refused(Opcode::Prepare, crate::Status::StaleEpoch, 0)),
        ("settle", Ok(ReplyOp::Settle(ack))),
        ("tails", Ok(ReplyOp::Tails(Box::new(tails)))),
        ("copy", Ok(ReplyOp::Copy(ack))),
        ("digest", Ok(ReplyOp::Digest(ack, vec![1 << 127 | 5, 6]))),
        ("snap", Ok(ReplyOp::Snap(ack))),
        ("attach", Ok(ReplyOp::Attach(ack))),
        ("need_conf", Ok(ReplyOp::NeedConf(ack, b"configuration bytes".to_vec()))),
    ]
}

/// Name and message, requests first.
pub(super) fn all() -> Vec<(String, Sample)> {
    let shard = ShardId { volume: VolumeId(77), index: 5 };
    let requests = requests().into_iter().enumerate().map(|(index, (name, op))| {
        let is_fua = matches!(name, "write_block" | "compare_and_write");
        let request = Request {
            command_id: 1000 + index as u64,
            shard,
            epoch: Epoch(7),
            attach_epoch: 3,
            is_fua,
            op,
        };
        (format!("request_{name}"), Sample::Request(request))
    });
    let replies = replies().into_iter().enumerate().map(|(index, (name, result))| {
        let (epoch, seq) = (Epoch(7), Seq(1_000_001));
        let reply = Reply { command_id: 2000 + index as u64, shard, epoch, seq, result };
        (format!("reply_{name}"), Sample::Reply(reply))
    });
    requests.chain(replies).collect()
}

/// Cut bytes into a frame as the reactor does, and parse it as the machines do.
pub(super) fn parse(bytes: &[u8]) -> Result<Sample, WireError> {
    let header = Header::parse(&bytes[..bytes.len().min(HEADER_BYTES)])?;
    let frame = frame(&header, &bytes[HEADER_BYTES..])?;
    match header.is_reply {
        true => Reply::parse(&header, frame).map(Sample::Reply),
        false => Request::parse(&header, frame).map(Sample::Request),
    }
}

fn frame(header: &Header, body: &[u8]) -> Result<crate::frame::Frame, WireError> {
    let expected = u64::from(header.body.meta_bytes) + u64::from(header.body.payload_bytes);
    if expected != body.len() as u64 {
        let found = body.len() as u64;
        return Err(WireError::Truncated { what: "body", expected, found });
    }
    let (meta, payload) = body.split_at(header.body.meta_bytes as usize);
    let mut buffers = BufList::new();
    if !payload.is_empty() {
        buffers.push(Pool::new(0).copy_of(payload).freeze());
    }
    Ok(crate::frame::Frame {
        header: smallvec::SmallVec::new(),
        meta: smallvec::SmallVec::from_slice(meta),
        payload: buffers,
    })
}
