//! The golden image of disk format 1 is mounted, and everything in it is there.
//!
//! `tools/make_golden.py` has made it: a disk whose writer was killed, with a checkpoint, and with
//! records that only the journal holds. It is never made again for this version, so a change of the
//! format that nobody has declared fails here.

use node::direct::DirectLane;
use runtime::engine::EngineChoice;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const IMAGE: &[u8] = include_bytes!("../../lane/testdata/disk-format-1.img");
const EXPECTED: &str = include_str!("../../lane/testdata/disk-format-1.txt");
const BLOCK: usize = 4096;
/// Blocks of one read.
const READ_BLOCKS: u32 = 128;

/// A folder that is gone when the test is over.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a new folder");
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Make the disk file: magic, size, then (number, block) of each block that is not zero.
fn unpack(path: &Path) {
    let word = |at: usize| u64::from_le_bytes(IMAGE[at..at + 8].try_into().expect("eight bytes"));
    assert_eq!(&IMAGE[..8], b"PFSPARSE");
    let file = File::create(path).expect("a file");
    file.set_len(word(8)).expect("room for a sparse file");
    for at in (16..IMAGE.len()).step_by(8 + BLOCK) {
        let block = &IMAGE[at + 8..at + 8 + BLOCK];
        file.write_all_at(block, word(at) * BLOCK as u64).expect("written");
    }
}

fn content_digest(lane: &DirectLane, shard_ix: u32, blocks: u32) -> String {
    let mut digest = Sha256::new();
    for first in (0..blocks).step_by(READ_BLOCKS as usize) {
        digest.update(lane.read(shard_ix, first, READ_BLOCKS).expect("every block is readable"));
    }
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn disk_format_1_is_read_for_ever() {
    let expected: HashMap<&str, &str> =
        EXPECTED.lines().map(|line| line.split_once(' ').expect("name value")).collect();
    let number = |name: &str| expected[name].parse::<u64>().expect("a number");
    let hex = expected["cluster_id"];
    let cluster: Vec<u8> = (0..16)
        .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hexadecimal"))
        .collect();
    let cluster: [u8; 16] = cluster.try_into().expect("sixteen bytes");
    let (volume, blocks) = (number("volume_id"), number("blocks") as u32);
    let folder = Folder::new("pureflash-golden");
    let path = folder.0.join("disk0.img");
    unpack(&path);

    let mut lane = DirectLane::open(&path, &cluster, EngineChoice::Auto).expect("it mounts");
    let facts = lane.facts().expect("it runs");
    assert!(facts.report.records > 0, "its last records are in the journal only");
    assert_eq!((facts.report.poisoned_blocks, facts.report.damaged_blocks), (0, 0));
    assert_eq!(facts.replicas, [(0, volume, 0, blocks, number("last_seq"))]);
    assert_eq!(content_digest(&lane, 0, blocks), expected["sha256"]);

    // What this version writes after it is read in turn, over a clean close.
    lane.write(0, (number("last_seq") + 1, number("last_seq")), 7, &[9; BLOCK]).expect("written");
    lane.close().expect("a clean close");
    let mut lane = DirectLane::open(&path, &cluster, EngineChoice::Auto).expect("it mounts again");
    assert_eq!(lane.read(0, 7, 1).expect("readable"), [9; BLOCK]);
    lane.discard(0, (number("last_seq") + 2, number("last_seq") + 1), 7, 1).expect("discarded");
    assert_eq!(content_digest(&lane, 0, blocks), expected["sha256"], "the rest is as it was");
    lane.close().expect("a clean close");
}
