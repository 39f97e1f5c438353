//! Round trips of arbitrary messages, one rejection per check, and arbitrary bytes.

use super::samples::{Sample, all, parse, pattern};
use super::*;
use crate::checksum::crc32c;
use crate::frame::Framing;
use crate::{Epoch, Lsn, Seq, ShardId, VolumeId};
use proptest::prelude::*;

fn sample(name: &str) -> Vec<u8> {
    let found = all().into_iter().find(|(other, _)| other == name);
    found.expect("a sample of this name").1.bytes()
}

/// Change header bytes and make its CRC right again, so that the next check is reached.
fn with_header(name: &str, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = sample(name);
    change(&mut bytes[..HEADER_BYTES - 4]);
    let crc = crc32c(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Change bytes of an extension of `len` bytes and make its CRC right again.
fn with_extension(name: &str, len: usize, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = sample(name);
    let extension = &mut bytes[HEADER_BYTES..HEADER_BYTES + len];
    change(extension);
    let crc = crc32c(extension);
    bytes[HEADER_BYTES + len..HEADER_BYTES + len + 4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[track_caller]
fn rejected(bytes: &[u8]) -> WireError {
    parse(bytes).expect_err("must be refused")
}

#[track_caller]
fn bad_field(bytes: &[u8], expected: &str) {
    let error = rejected(bytes);
    let is_it = matches!(&error, WireError::Field { name, .. } if *name == expected);
    assert!(is_it, "{error} instead of a bad {expected}");
}

#[test]
fn checks_come_in_the_order_magic_version_checksum_opcode_flags_length() {
    // Each message is wrong in everything from one check on; the first check must speak.
    let mut bytes = sample("request_write_block");
    put_u32(&mut bytes, 56, u32::MAX);
    bytes[6] = 0xff;
    bytes[5] = 0xee;
    let mut wrong_version = bytes.clone();
    wrong_version[4] = 9;
    let mut wrong_magic = wrong_version.clone();
    wrong_magic[0] = b'X';
    assert!(matches!(rejected(&wrong_magic), WireError::Magic { .. }));
    assert_eq!(rejected(&wrong_version), WireError::Version { found: 9 });
    assert!(matches!(rejected(&bytes), WireError::HeaderChecksum { .. }));
    let reseal = |bytes: &mut Vec<u8>| {
        let crc = crc32c(&bytes[..60]);
        put_u32(bytes, 60, crc);
    };
    reseal(&mut bytes);
    assert_eq!(rejected(&bytes), WireError::UnknownOpcode(0xee));
    bytes[5] = Opcode::Write as u8;
    reseal(&mut bytes);
    assert!(matches!(rejected(&bytes), WireError::UnknownFlags { flags: 0x00ff, .. }));
    bytes[6] = 0;
    reseal(&mut bytes);
    assert!(matches!(rejected(&bytes), WireError::BodyLength { found: u32::MAX, .. }));
}

#[test]
fn every_flipped_bit_of_a_header_is_noticed() {
    let good = sample("request_prepare_write");
    for bit in 0..HEADER_BYTES * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(!rejected(&bytes).is_answerable(), "bit {bit}");
    }
}

#[test]
fn every_flipped_bit_of_a_body_is_noticed_and_costs_only_this_request() {
    for name in ["request_prepare_write", "request_hello_client", "reply_tails", "reply_read"] {
        let good = sample(name);
        for bit in HEADER_BYTES * 8..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = rejected(&bytes);
            assert!(error.is_answerable(), "{name} bit {bit}: {error}");
            assert_eq!(error.status(), crate::Status::BadChecksum, "{name} bit {bit}");
        }
    }
}

#[test]
fn a_message_cut_anywhere_is_truncated() {
    for (name, sample) in all() {
        let bytes = sample.bytes();
        for len in [0, 1, HEADER_BYTES - 1, HEADER_BYTES, bytes.len() - 1] {
            let cut = bytes.len().min(len);
            if cut == bytes.len() {
                continue;
            }
            let error = rejected(&bytes[..cut]);
            assert!(matches!(error, WireError::Truncated { .. }), "{name} at {cut}: {error}");
        }
    }
}

#[test]
fn unknown_and_misplaced_flags_are_refused() {
    for (name, flags) in [
        ("request_write_block", 8u16),   // unknown
        ("request_write_block", 0x8000), // unknown
        ("request_write_block", 4),      // an error that is no reply
        ("request_read", 2),             // FUA on a read
        ("reply_write", 1 | 2),          // FUA on a reply
    ] {
        let bytes = with_header(name, |header| header[6..8].copy_from_slice(&flags.to_le_bytes()));
        assert!(matches!(rejected(&bytes), WireError::UnknownFlags { .. }), "{name} {flags}");
    }
}

#[test]
fn lengths_beyond_the_opcode_are_refused_before_the_body() {
    let too_long = |name, length, limit| {
        let bytes = with_header(name, |header| put_u32(header, 28, length));
        let error = Header::parse(&bytes[..HEADER_BYTES]).expect_err("must be refused");
        let is_expected = matches!(&error, WireError::TooLong { found, limit: other, .. }
            if *found == length && *other == limit);
        assert!(is_expected, "{name}: {error}");
    };
    too_long("request_write_block", PAYLOAD_BYTES_MAX + 512, PAYLOAD_BYTES_MAX);
    too_long("request_read", u32::MAX, PAYLOAD_BYTES_MAX);
    too_long("request_discard", RANGE_BYTES_MAX + 512, RANGE_BYTES_MAX);
    too_long("request_compare_and_write", 4608, COMPARE_BYTES_MAX);
    too_long("request_flush", 512, 0);
    too_long("request_prepare_write", PAYLOAD_BYTES_MAX + 4096, PAYLOAD_BYTES_MAX);
    too_long("reply_need_conf", CONF_BYTES_MAX + 1, CONF_BYTES_MAX);
    too_long("reply_write", 1, 0);
    too_long("reply_read_failed", 4096, 0);
    for extra in [1u32, 512, 4096] {
        let bytes = with_header("request_write_block", |header| {
            put_u32(header, 56, 4 + 4096 + extra);
        });
        assert!(matches!(rejected(&bytes), WireError::BodyLength { .. }));
    }
}

#[test]
fn an_error_reply_carries_no_data() {
    let bytes = with_header("reply_read", |header| header[6] |= 4);
    assert!(matches!(rejected(&bytes), WireError::TooLong { limit: 0, .. }));
    let failed = sample("reply_read_failed");
    assert_eq!(failed.len(), HEADER_BYTES);
}

#[test]
fn an_error_reply_has_a_reason_and_a_good_one_has_none() {
    bad_field(&with_header("reply_read_failed", |header| put_u32(header, 32, 0)), "status");
    bad_field(&with_header("reply_write", |header| put_u32(header, 32, 41)), "status");
    bad_field(&with_header("reply_write", |header| put_u32(header, 36, 1)), "detail");
    let newer = with_header("reply_write_refused", |header| put_u32(header, 32, 12_345));
    let Ok(Sample::Reply(reply)) = parse(&newer) else { panic!("a code of a newer peer") };
    assert_eq!(reply.result.expect_err("an error").status, crate::Status::Internal);
}

#[test]
fn ranges_are_sectors_and_end_somewhere() {
    let moved = |name, offset| with_header(name, move |header| put_u64(header, 32, offset));
    let sized = |name, length| with_header(name, move |header| put_u32(header, 28, length));
    assert!(matches!(rejected(&moved("request_read", 100)), WireError::Misaligned { .. }));
    assert!(matches!(rejected(&sized("request_read", 100)), WireError::Misaligned { .. }));
    assert!(matches!(rejected(&sized("request_read", 0)), WireError::Range { .. }));
    let last = u64::MAX - 511;
    assert!(matches!(rejected(&moved("request_discard", last)), WireError::Range { .. }));
    // Replicas exchange whole blocks only.
    let fragment = moved("request_prepare_discard", 512);
    assert!(matches!(rejected(&fragment), WireError::Misaligned { .. }));
    let fragment = moved("request_copy_zero", 512);
    assert!(matches!(rejected(&fragment), WireError::Misaligned { .. }));
    // COMPARE_AND_WRITE must not leave its block; the sample's two fragments still have one CRC
    // each when the range starts at the block's last sector.
    let mut request = match all().into_iter().find(|(name, _)| name == "request_compare_and_write")
    {
        Some((_, Sample::Request(request))) => request,
        _ => panic!("a request"),
    };
    request.op = RequestOp::CompareAndWrite {
        compare: CheckedData::compute(3584, pattern(1, 1024)),
        write: RangeData::compute(3584, pattern(2, 1024)).expect("a good range"),
        acked_upto: 0,
    };
    let bytes = Sample::Request(request).bytes();
    assert!(matches!(rejected(&bytes), WireError::Range { offset: 3584, length: 1024 }));
}

#[test]
fn fields_that_are_never_right_are_refused() {
    const HELLO: usize = 200;
    const PREPARE: usize = 88;
    bad_field(&with_header("request_flush", |h| put_u64(h, 32, 512)), "offset");
    bad_field(&with_header("request_flush", |h| put_u64(h, 16, ID_LIMIT)), "volume_id");
    bad_field(&with_extension("request_hello_client", HELLO, |e| e[0] = 0), "version_min");
    bad_field(&with_extension("request_hello_client", HELLO, |e| e[1] = 0), "version_min");
    bad_field(&with_extension("request_hello_client", HELLO, |e| e[2] = 4), "kind");
    bad_field(&with_extension("request_hello_client", HELLO, |e| e[2] = 2), "ticket.volume");
    bad_field(&with_extension("request_hello_peer", HELLO, |e| e[2] = 1), "store");
    for (at, name) in [(24, "payload_bytes_max"), (28, "requests_max"), (32, "inflight_bytes_max")]
    {
        bad_field(&with_extension("request_hello_peer", HELLO, |e| put_u32(e, at, 0)), name);
    }
    bad_field(&with_extension("request_hello_client", HELLO, |e| e[84] = 2), "ticket.rights");
    bad_field(&with_extension("request_hello_client", HELLO, |e| e[59] = 1), "ticket.volume");
    bad_field(&with_extension("request_hello_peer", HELLO, |e| e[127] = 1), "store");
    bad_field(&with_extension("reply_hello", 104, |e| e[1] = 1), "version");
    bad_field(&with_extension("request_fence_path", 12, |e| e[9] = 1), "slot");
    bad_field(&with_extension("request_write_zeroes", 4, |e| e[0] = 2), "options");
    bad_field(&with_extension("request_prepare_write", PREPARE, |e| e[80] = 0x12), "op");
    bad_field(&with_extension("request_prepare_write", PREPARE, |e| e[80] = 0x13), "op");
    bad_field(&with_extension("request_prepare_discard", PREPARE, |e| e[80] = 0x11), "op");
    bad_field(&with_extension("request_prepare_write", PREPARE, |e| e[84] = 1), "options");
    bad_field(&with_extension("request_prepare_write", PREPARE, |e| e[56] = 1), "session");
    bad_field(&with_extension("request_settle_data", 68, |e| e[64] = 4), "state");
    bad_field(&with_extension("request_settle_data", 68, |e| e[64] = 2), "state");
    bad_field(&with_extension("request_settle_poison", 68, |e| e[64] = 1), "state");
    bad_field(&with_extension("request_copy_zero", 80, |e| e[76] = 2), "options");
    bad_field(&with_extension("request_digest", 80, |e| put_u32(e, 76, 0)), "region_count");
    bad_field(&with_extension("request_digest", 80, |e| put_u32(e, 76, 65_537)), "region_count");
    bad_field(&with_extension("request_digest", 80, |e| put_u32(e, 72, !0)), "region_count");
    bad_field(&with_extension("request_snap_hold", 76, |e| e[72] = 5), "action");
    bad_field(&with_extension("request_attach_advance", 92, |e| e[88] = 2), "action");
    bad_field(&with_extension("request_attach_advance", 92, |e| e[64] = 1), "action");
    bad_field(&with_extension("reply_compare_and_write", 8, |e| e[0] = 2), "outcome");
    bad_field(&with_extension("reply_compare_and_write", 8, |e| e[4] = 1), "first_difference");
    bad_field(&with_extension("reply_tails", 72, |e| e[64] = 3), "record_count");
    let start = with_header("reply_read", |header| put_u32(header, 36, 512 + 4096));
    bad_field(&start, "detail");
}

#[test]
fn records_must_be_whole_and_known() {
    let with_data = |name: &str, at: usize, value: u8, extension: usize| {
        let mut bytes = sample(name);
        let data = HEADER_BYTES + extension + 4;
        bytes[data + at] = value;
        let crc = crc32c(&bytes[data..]);
        put_u32(&mut bytes, data - 4, crc);
        bytes
    };
    bad_field(&with_data("request_ping_heartbeat", 20, 9, 68), "kind");
    bad_field(&with_data("request_ping_heartbeat", 7, 9, 68), "volume_id");
    bad_field(&with_data("reply_tails", 36, 9, 76), "op");
    bad_field(&with_data("reply_tails", 40, 9, 76), "state");
    // One byte less than a record, with everything else consistent.
    let mut bytes = sample("reply_fence_path");
    bytes.pop();
    let crc = crc32c(&bytes[HEADER_BYTES + 4..]);
    put_u32(&mut bytes, HEADER_BYTES, crc);
    put_u32(&mut bytes, 28, 31);
    put_u32(&mut bytes, 56, 35);
    let crc = crc32c(&bytes[..60]);
    put_u32(&mut bytes, 60, crc);
    bad_field(&bytes, "length");
}

#[test]
fn before_hello_nothing_else_passes_and_sides_are_not_mixed_up() {
    let header = |name: &str| sample(name)[..HEADER_BYTES].to_vec();
    let passes = |mut framing: PfwFraming, name: &str| framing.body(&header(name)).is_ok();
    let (caller, called) = (Side::Caller, Side::Called);
    assert!(passes(PfwFraming::handshake(called), "request_hello_client"));
    assert!(!passes(PfwFraming::handshake(called), "request_write_block"));
    assert!(!passes(PfwFraming::handshake(called), "reply_hello"));
    assert!(passes(PfwFraming::handshake(caller), "reply_hello"));
    assert!(!passes(PfwFraming::open(called), "request_hello_client"));
    assert!(passes(PfwFraming::open(called), "request_write_block"));
    assert!(!passes(PfwFraming::open(caller), "request_write_block"));
    assert!(passes(PfwFraming::open(caller), "reply_read"));
    let layout = PfwFraming::open(called).body(&header("request_write_fragments"));
    let layout = layout.expect("a good header");
    assert_eq!((layout.meta_bytes, layout.payload_bytes), (3 * 4, 512 + 4096 + 1024));
}

#[test]
fn a_range_touches_as_many_blocks_as_an_obvious_count_says() {
    for start in (0..4096).step_by(512) {
        for length in (0..20_000).step_by(512) {
            let obvious: std::collections::BTreeSet<u32> =
                (start..start + length).step_by(512).map(|byte| byte / 4096).collect();
            assert_eq!(started_blocks(start, length), obvious.len() as u32, "{start}+{length}");
        }
    }
    assert_eq!(started_blocks(512, 1 << 20), 257);
}

#[test]
fn both_sides_agree_on_the_highest_common_version_and_the_lower_limits() {
    let versions = |min, max| VersionRange::new(min, max).expect("a good range");
    assert_eq!(versions(1, 3).agree(versions(2, 5)), Some(3));
    assert_eq!(versions(1, 2).agree(versions(3, 5)), None);
    let small = Limits { payload_bytes_max: 4096, requests_max: 999, inflight_bytes_max: 8192 };
    let agreed = Limits::DEFAULT.agree(small);
    assert_eq!(agreed, Limits { requests_max: 128, ..small });
}

fn a_request() -> impl Strategy<Value = Request> {
    let head = (any::<u64>(), 0..ID_LIMIT, any::<u32>(), any::<u64>(), any::<u64>());
    (head, a_request_op()).prop_map(|((command_id, volume, index, epoch, attach_epoch), op)| {
        let shard = ShardId { volume: VolumeId(volume), index };
        let is_fua = matches!(op, RequestOp::Write(_)) && command_id % 2 == 0;
        Request { command_id, shard, epoch: Epoch(epoch), attach_epoch, is_fua, op }
    })
}

fn a_range(unit: u64, units_max: u32) -> impl Strategy<Value = ByteRange> {
    (0..1u64 << 40, 1..=units_max).prop_map(move |(first, count)| {
        ByteRange::new(first * unit, count * unit as u32).expect("a good range")
    })
}

fn data(unit: u64, units_max: u32) -> impl Strategy<Value = RangeData> {
    (any::<u8>(), a_range(unit, units_max)).prop_map(|(first, range)| {
        let data = pattern(first, range.length() as usize);
        RangeData::compute(range.offset(), data).expect("a good range")
    })
}

fn a_peer() -> impl Strategy<Value = PeerContext> {
    any::<[u64; 7]>().prop_map(|n| PeerContext {
        lsn: Lsn { epoch: Epoch(n[0]), seq: Seq(n[1]) },
        commit_lsn: Lsn { epoch: Epoch(n[2]), seq: Seq(n[3]) },
        snap_seq: n[4],
        incarnation: n[5],
        history_id: n[6],
    })
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        data(4096, 4).prop_map(Content::Data),
        a_range(4096, 256).prop_map(Content::Inherit),
        a_range(4096, 256).prop_map(Content::Zero),
        a_range(4096, 256).prop_map(Content::Poison),
    ]
}

fn who() -> impl Strategy<Value = Who> {
    let ticket = (0..ID_LIMIT, any::<[u64; 3]>(), any::<bool>(), any::<[u8; 32]>());
    let client = ticket.prop_map(|(volume, n, may_write, mac)| {
        let rights = if may_write { Rights::READ_WRITE } else { Rights::READ };
        let (attach_epoch, session, expires) = (n[0], n[1], n[2]);
        let volume = VolumeId(volume);
        let ticket = Ticket { volume, attach_epoch, session, expires, rights };
        Who::Client(SignedTicket { ticket, mac })
    });
    let peer = (0..ID_LIMIT, any::<u64>(), any::<[u8; 32]>(), any::<[u8; 32]>());
    let peer = peer.prop_map(|(store, incarnation, nonce, proof)| Peer {
        store,
        incarnation,
        nonce,
        proof,
    });
    let peer = (peer, any::<bool>());
    prop_oneof![
        client,
        peer.prop_map(|(peer, beats)| if beats { Who::Heartbeat(peer) } else { Who::Peer(peer) }),
    ]
}

fn a_hello() -> impl Strategy<Value = RequestOp> {
    let limits = (4096..u32::MAX, 1..u32::MAX, 4096..u32::MAX);
    let limits = limits.prop_map(|(payload_bytes_max, requests_max, inflight_bytes_max)| Limits {
        payload_bytes_max,
        requests_max,
        inflight_bytes_max,
    });
    let rest = (any::<u64>(), any::<u32>(), any::<u8>(), any::<u64>(), any::<[u8; 16]>());
    (1..=255u8, 1..=255u8, limits, who(), rest).prop_map(|(a, b, limits, who, rest)| {
        let (features, lane, slot, generation, cluster_id) = rest;
        let versions = VersionRange::new(a.min(b), a.max(b)).expect("a good range");
        let path = PathSlot { slot, generation };
        let hello = Hello { versions, features, lane, path, limits, cluster_id, who };
        RequestOp::Hello(Box::new(hello))
    })
}

fn a_ping() -> impl Strategy<Value = Ping> {
    let kind = prop::sample::select(vec![
        HeartbeatKind::Lease,
        HeartbeatKind::Drop,
        HeartbeatKind::Release,
        HeartbeatKind::Refused,
    ]);
    let entry = (0..ID_LIMIT, any::<u32>(), any::<u64>(), kind);
    let entry = entry.prop_map(|(volume, index, epoch, kind)| {
        let shard = ShardId { volume: VolumeId(volume), index };
        HeartbeatEntry { shard, epoch: Epoch(epoch), kind }
    });
    // 400 records of 24 bytes cross block edges.
    (any::<[u64; 8]>(), prop::collection::vec(entry, 0..400)).prop_map(|(n, entries)| Ping {
        sequence: n[0],
        base_sequence: n[1],
        store: n[2],
        incarnation: n[3],
        peer_incarnation: n[4],
        term: n[5],
        lineage: n[6],
        revision: n[7],
        entries,
    })
}

fn a_request_op() -> impl Strategy<Value = RequestOp> {
    let prepare_op = prop_oneof![
        data(4096, 4).prop_map(PrepareOp::Write),
        a_range(4096, 16_384).prop_map(PrepareOp::Discard),
        (a_range(4096, 16_384), any::<bool>()).prop_map(|(range, is_kept_allocated)| {
            PrepareOp::WriteZeroes { range, is_kept_allocated }
        }),
        (any::<[u64; 3]>(), data(4096, 1)).prop_map(|(n, data)| PrepareOp::CompareAndWrite {
            session: n[0],
            session_command: n[1],
            acked_upto: n[2],
            data,
        }),
    ];
    let snap = prop::sample::select(vec![
        SnapAction::Hold,
        SnapAction::Seal,
        SnapAction::Release,
        SnapAction::Delete,
    ]);
    prop_oneof![
        a_hello(),
        (any::<u8>(), any::<u64>())
            .prop_map(|(slot, generation)| RequestOp::FencePath { slot, generation }),
        a_ping().prop_map(RequestOp::Ping),
        (a_range(512, 2048), prop::option::of(0..u64::MAX))
            .prop_map(|(range, snap_seq)| RequestOp::Read { range, snap_seq }),
        data(512, 40).prop_map(RequestOp::Write),
        Just(RequestOp::Flush),
        a_range(512, 1 << 17).prop_map(RequestOp::Discard),
        (a_range(512, 1 << 17), any::<bool>()).prop_map(|(range, is_kept_allocated)| {
            RequestOp::WriteZeroes { range, is_kept_allocated }
        }),
        (data(4096, 1), any::<u8>(), any::<u64>()).prop_map(|(write, first, acked_upto)| {
            let compare = CheckedData::compute(0, pattern(first, 4096));
            RequestOp::CompareAndWrite { compare, write, acked_upto }
        }),
        (a_peer(), prepare_op)
            .prop_map(|(peer, op)| RequestOp::Prepare(Box::new(Prepare { peer, op }))),
        (a_peer(), any::<u64>(), content()).prop_map(|(peer, layer_snap_seq, content)| {
            RequestOp::Settle(Box::new(Settle { peer, layer_snap_seq, content }))
        }),
        a_peer().prop_map(RequestOp::Tails),
        (a_peer(), any::<(u64, u64)>(), any::<bool>(), content()).prop_map(
            |(peer, (resync_id, layer_snap_seq), is_last, content)| {
                RequestOp::Copy(Box::new(Copy {
                    peer,
                    resync_id,
                    layer_snap_seq,
                    is_last,
                    content,
                }))
            }
        ),
        (a_peer(), any::<(u64, u64)>(), 0..1u32 << 20, 1..=65_536u32).prop_map(
            |(peer, (resync_id, layer_snap_seq), first_region, region_count)| {
                let digest = Digest { peer, resync_id, layer_snap_seq, first_region, region_count };
                RequestOp::Digest(digest)
            }
        ),
        (a_peer(), any::<(u64, u64)>(), snap).prop_map(
            |(peer, (cut_id, target_snap_seq), action)| {
                RequestOp::Snap(Snap { peer, cut_id, target_snap_seq, action })
            }
        ),
        (a_peer(), any::<u64>()).prop_map(|(peer, attach_epoch)| {
            RequestOp::Attach(peer, AttachOp::Advance { attach_epoch })
        }),
        (a_peer(), any::<(u64, u64, u64)>()).prop_map(|(peer, (client, session, until))| {
            RequestOp::Attach(peer, AttachOp::Block { client, session, until })
        }),
        a_peer().prop_map(RequestOp::NeedConf),
    ]
}

fn a_reply_op() -> impl Strategy<Value = ReplyOp> {
    let ack = || {
        any::<[u64; 5]>().prop_map(|n| Ack {
            incarnation: n[0],
            history_id: n[1],
            lsn_epoch: Epoch(n[2]),
            resync_id: n[3],
            credit: n[4],
        })
    };
    let status = || prop::sample::select(crate::Status::ALL.to_vec());
    let outcome = || {
        prop_oneof![
            Just(CompareOutcome::Written),
            (0..4096u32).prop_map(|at| CompareOutcome::Different { at }),
        ]
    };
    let fence = (any::<[u64; 3]>(), status(), any::<u32>());
    let fence = fence.prop_map(|(n, status, detail)| {
        let lsn = Lsn { epoch: Epoch(n[1]), seq: Seq(n[2]) };
        FenceOutcome { command_id: n[0], lsn, status, detail }
    });
    let op = prop::sample::select(vec![
        TailOp::Write,
        TailOp::Discard,
        TailOp::WriteZeroes,
        TailOp::Settle,
    ]);
    let state = prop::sample::select(vec![
        BlockState::Inherit,
        BlockState::Data,
        BlockState::Zero,
        BlockState::Poison,
    ]);
    let record = (any::<[u64; 3]>(), a_range(4096, 256), op, state);
    let record = record.prop_map(|(n, range, op, state)| {
        let lsn = Lsn { epoch: Epoch(n[0]), seq: Seq(n[1]) };
        TailRecord { lsn, range, snap_seq: n[2], op, state }
    });
    let result = (any::<[u64; 4]>(), outcome()).prop_map(|(n, outcome)| ResultRecord {
        session: n[0],
        session_command: n[1],
        lsn: Lsn { epoch: Epoch(n[2]), seq: Seq(n[3]) },
        outcome,
    });
    let records = (prop::collection::vec(record, 0..120), prop::collection::vec(result, 0..9));
    let tails = (ack(), any::<[u64; 3]>(), records).prop_map(|(ack, n, (records, results))| {
        let complete_lsn = Lsn { epoch: Epoch(n[0]), seq: Seq(n[1]) };
        Tails { ack, complete_lsn, snap_seq: n[2], records, results }
    });
    prop_oneof![
        prop::collection::vec(fence, 0..129).prop_map(ReplyOp::FencePath),
        a_ping().prop_map(ReplyOp::Ping),
        data(512, 40).prop_map(|data| ReplyOp::Read(data.checked().clone())),
        Just(ReplyOp::Write),
        Just(ReplyOp::Flush),
        Just(ReplyOp::Discard),
        Just(ReplyOp::WriteZeroes),
        outcome().prop_map(ReplyOp::CompareAndWrite),
        ack().prop_map(ReplyOp::Prepare),
        ack().prop_map(ReplyOp::Settle),
        tails.prop_map(|tails| ReplyOp::Tails(Box::new(tails))),
        ack().prop_map(ReplyOp::Copy),
        (ack(), prop::collection::vec(any::<u128>(), 1..300))
            .prop_map(|(ack, digests)| ReplyOp::Digest(ack, digests)),
        ack().prop_map(ReplyOp::Snap),
        ack().prop_map(ReplyOp::Attach),
        (ack(), prop::collection::vec(any::<u8>(), 0..=4096))
            .prop_map(|(ack, conf)| ReplyOp::NeedConf(ack, conf)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn requests_round_trip(request in a_request()) {
        let sample = Sample::Request(request);
        prop_assert_eq!(parse(&sample.bytes()), Ok(sample));
    }

    #[test]
    fn replies_round_trip(op in a_reply_op(), n in any::<[u64; 3]>(), volume in 0..ID_LIMIT) {
        let shard = ShardId { volume: VolumeId(volume), index: n[0] as u32 };
        let reply = Reply {
            command_id: n[0], shard, epoch: Epoch(n[1]), seq: Seq(n[2]), result: Ok(op),
        };
        let sample = Sample::Reply(reply);
        prop_assert_eq!(parse(&sample.bytes()), Ok(sample));
    }

    #[test]
    fn refusals_round_trip(opcode in prop::sample::select(Opcode::ALL.to_vec()),
                           status in prop::sample::select(crate::Status::ALL[1..].to_vec()),
                           detail in any::<u32>(), n in any::<u64>()) {
        let reply = Reply {
            command_id: n, shard: ShardId::default(), epoch: Epoch(n), seq: Seq(0),
            result: Err(Failure { opcode, status, detail }),
        };
        let sample = Sample::Reply(reply);
        prop_assert_eq!(parse(&sample.bytes()), Ok(sample));
    }
}

/// Mostly values that pass the checks on ranges, so that what lies behind them is reached.
fn a_place() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), (0..64u64).prop_map(|sector| sector * 512), any::<u64>()]
}

fn a_length() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (0..18u32).prop_map(|sector| sector * 512), 0..9000u32]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    /// Arbitrary bytes behind a header that passes, because a random header never would.
    #[test]
    fn arbitrary_bytes_never_panic(opcode in prop::sample::select(Opcode::ALL.to_vec()),
                                   flags in 0..8u8, place in a_place(), length in a_length(),
                                   crcs_are_right in any::<bool>(),
                                   body in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = sample("request_flush");
        bytes[5] = opcode as u8;
        bytes[6] = flags;
        put_u32(&mut bytes, 28, length);
        put_u64(&mut bytes, 32, place);
        bytes.extend_from_slice(&body);
        // Find the body length that this header wants, so that the parser is reached.
        for _ in 0..2 {
            let found = (bytes.len() - HEADER_BYTES) as u32;
            put_u32(&mut bytes, 56, found);
            let crc = crc32c(&bytes[..60]);
            put_u32(&mut bytes, 60, crc);
            match Header::parse(&bytes[..HEADER_BYTES]) {
                Err(WireError::BodyLength { expected, .. }) => {
                    bytes.resize(HEADER_BYTES + expected as usize, 0x33);
                }
                Ok(header) if crcs_are_right => {
                    let meta = header.body.meta_bytes as usize;
                    if let Some(extension) = meta.checked_sub(4) {
                        let crc = crc32c(&bytes[HEADER_BYTES..HEADER_BYTES + extension]);
                        put_u32(&mut bytes, HEADER_BYTES + extension, crc);
                    }
                }
                Ok(_) | Err(_) => {}
            }
        }
        // An unknown status of an error reply is read as INTERNAL, so only these differ.
        let is_error = flags & 4 != 0;
        if let Ok(sample) = parse(&bytes) && !is_error {
            prop_assert_eq!(sample.bytes(), bytes, "what is accepted is written the same way");
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(parse(&bytes).is_err(), "no header CRC is right by chance");
    }
}

#[test]
fn a_signed_ticket_is_its_bytes_and_nothing_else_is_one() {
    let ticket = Ticket {
        volume: VolumeId(5),
        attach_epoch: 6,
        session: 7,
        expires: 8,
        rights: Rights::READ_WRITE,
    };
    let signed = SignedTicket { ticket, mac: std::array::from_fn(|at| at as u8) };
    let bytes = signed.to_bytes();
    assert_eq!(SignedTicket::from_bytes(&bytes), Ok(signed));
    for length in (0..bytes.len()).chain([bytes.len() + 1]) {
        let mut other = bytes.to_vec();
        other.resize(length, 0);
        assert!(SignedTicket::from_bytes(&other).is_err(), "{length} bytes");
    }
    let mut wrong = bytes;
    wrong[32] = 2;
    let expected = WireError::Field { name: "ticket.rights", value: 2 };
    assert_eq!(SignedTicket::from_bytes(&wrong), Err(expected));
}
