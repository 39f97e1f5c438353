//! The golden bytes in `testdata/`: what this codec writes today is what it wrote when they were
//! made, and what the independent Python model reads.
//!
//! `PUREFLASH_WRITE_GOLDEN=1 cargo test --release -p pureflash-proto golden` writes them anew.
//! That is a change of the wire format: it needs a new version or feature bit and an upgrade path.

use super::raw::{self, Describe};
use super::samples::{self, Sample};
use super::{HEADER_BYTES, Header, Opcode};
use std::fs;
use std::path::PathBuf;
use zerocopy::{FromBytes, IntoBytes};

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata")
}

/// Name and JSON value of each field of `T` at the front of `bytes`.
fn fields<T: FromBytes + Describe>(bytes: &[u8]) -> Vec<(String, String)> {
    let (value, _) = T::read_from_prefix(bytes).expect("golden bytes are complete");
    let mut out = Vec::new();
    value.describe("", &mut out);
    out
}

fn extension(header: &Header, bytes: &[u8]) -> Vec<(String, String)> {
    if header.is_error {
        return Vec::new();
    }
    match (header.opcode, header.is_reply) {
        (Opcode::Hello, false) => fields::<raw::Hello>(bytes),
        (Opcode::Hello, true) => fields::<raw::HelloReply>(bytes),
        (Opcode::FencePath, false) => fields::<raw::FencePath>(bytes),
        (Opcode::Ping, _) => fields::<raw::Ping>(bytes),
        (Opcode::Read, false) => fields::<raw::Read>(bytes),
        (Opcode::WriteZeroes, false) => fields::<raw::WriteZeroes>(bytes),
        (Opcode::CompareAndWrite, false) => fields::<raw::CompareAndWrite>(bytes),
        (Opcode::CompareAndWrite, true) => fields::<raw::CompareReply>(bytes),
        (Opcode::Prepare, false) => fields::<raw::Prepare>(bytes),
        (Opcode::Settle, false) => fields::<raw::Settle>(bytes),
        (Opcode::Copy, false) => fields::<raw::Copy>(bytes),
        (Opcode::Digest, false) => fields::<raw::Digest>(bytes),
        (Opcode::Snap, false) => fields::<raw::Snap>(bytes),
        (Opcode::Attach, false) => fields::<raw::Attach>(bytes),
        (Opcode::Tails | Opcode::NeedConf, false) => fields::<raw::Peer>(bytes),
        (Opcode::Tails, true) => fields::<raw::TailsReply>(bytes),
        (
            Opcode::Prepare
            | Opcode::Settle
            | Opcode::Copy
            | Opcode::Digest
            | Opcode::Snap
            | Opcode::Attach
            | Opcode::NeedConf,
            true,
        ) => fields::<raw::Ack>(bytes),
        (Opcode::FencePath | Opcode::Read, true)
        | (Opcode::Write | Opcode::Flush | Opcode::Discard, _)
        | (Opcode::WriteZeroes, true) => Vec::new(),
    }
}

/// One object of golden.json.
fn describe(name: &str, bytes: &[u8]) -> String {
    let header = Header::parse(&bytes[..HEADER_BYTES]).expect("golden bytes are right");
    let data = &bytes[HEADER_BYTES + header.body.meta_bytes as usize..];
    let hex: String = data.iter().map(|byte| format!("{byte:02x}")).collect();
    let join = |fields: Vec<(String, String)>| {
        let parts: Vec<String> =
            fields.iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
        parts.join(", ")
    };
    let head = [
        ("opcode", u64::from(header.opcode as u8)),
        ("is_reply", header.is_reply.into()),
        ("is_fua", header.is_fua.into()),
        ("is_error", header.is_error.into()),
        ("command_id", header.command_id),
        ("volume_id", header.shard.volume.0),
        ("shard_index", header.shard.index.into()),
        ("length", header.length.into()),
        ("place", header.place),
        ("epoch", header.epoch),
        ("position", header.position),
    ];
    let head = head.map(|(name, value)| (name.to_owned(), value.to_string())).to_vec();
    format!(
        "  {{\"name\": \"{name}\",\n   \"header\": {{{}}},\n   \"extension\": {{{}}},\n   \
         \"data\": \"{hex}\"}}",
        join(head),
        join(extension(&header, &bytes[HEADER_BYTES..]))
    )
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the golden bytes are files of the source tree")]
fn golden_bytes_are_what_the_codec_writes_and_reads() {
    let samples: Vec<(String, Sample)> = samples::all();
    let objects: Vec<String> =
        samples.iter().map(|(name, sample)| describe(name, &sample.bytes())).collect();
    let description = format!("[\n{}\n]\n", objects.join(",\n"));
    if std::env::var_os("PUREFLASH_WRITE_GOLDEN").is_some() {
        fs::create_dir_all(directory()).expect("a writable source tree");
        for (name, sample) in &samples {
            let path = directory().join(format!("{name}.bin"));
            fs::write(path, sample.bytes()).expect("a writable source tree");
        }
        let path = directory().join("golden.json");
        fs::write(path, &description).expect("a writable source tree");
    }
    for (name, sample) in &samples {
        let golden = fs::read(directory().join(format!("{name}.bin"))).expect("a golden file");
        assert!(sample.bytes().as_bytes() == golden.as_slice(), "{name} changed its bytes");
        assert_eq!(samples::parse(&golden).as_ref(), Ok(sample), "{name} is read back");
    }
    let golden = fs::read_to_string(directory().join("golden.json")).expect("a description");
    assert!(golden == description, "golden.json describes other bytes");
    let files = fs::read_dir(directory()).expect("a directory").count();
    assert_eq!(files, samples.len() + 1, "no file without a sample");
}
