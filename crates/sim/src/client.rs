//! A client: a real session, and what it is made to ask.
//!
//! Requests go to a few hot blocks, so that they collide. Every written block carries a value that no
//! other block ever carries.

use crate::content;
use crate::history::Kind;
use crate::options::Options;
use crate::random::Random;
use crate::store::VOLUME;
use proto::block::{BlockOp, BlockRequest};
use proto::wire::{Rights, SignedTicket, Ticket};
use proto::{BLOCK_BYTES, Pool, Tick};
use shard::conf::ShardConf;
use shard::session::{self, Effect, Session, ShardRoute, Target, VolumeConf};
use std::net::SocketAddr;

/// Blocks of a region (1 MiB).
pub const REGION_BLOCKS: u64 = lane::REGION_BLOCKS as u64;
/// The cluster of every world.
pub const CLUSTER: [u8; 16] = *b"simulated worlds";

/// Where a store listens.
#[must_use]
pub fn address(store: u64) -> SocketAddr {
    let number = u8::try_from(store).expect("few stores");
    SocketAddr::from(([10, 0, 0, number], 7162))
}

/// Which store listens there.
#[must_use]
pub fn store_at(address: SocketAddr) -> u64 {
    match address.ip() {
        std::net::IpAddr::V4(ip) => ip.octets()[3].into(),
        std::net::IpAddr::V6(_) => unreachable!("no world has any"),
    }
}

/// What the conductor tells a session about the volume.
#[must_use]
pub fn volume_conf(client: u64, options: &Options, confs: &[ShardConf]) -> VolumeConf {
    let shard_bytes = options.regions * REGION_BLOCKS * BLOCK_BYTES as u64;
    let attach_epoch = confs.iter().map(|conf| conf.attach_epoch).max().unwrap_or(1);
    let ticket = Ticket {
        volume: VOLUME,
        attach_epoch,
        session: client,
        expires: u64::MAX,
        rights: Rights::READ_WRITE,
    };
    let ticket = SignedTicket { ticket, mac: [1; 32] };
    let routes = confs.iter().map(|conf| ShardRoute {
        index: conf.shard.index,
        epoch: conf.epoch,
        target: Target { address: address(conf.primary_member().store), lane: 0 },
    });
    let size = (options.shards * shard_bytes, shard_bytes);
    VolumeConf::new(VOLUME, size, attach_epoch, ticket, routes.collect()).expect("a sound volume")
}

/// The blocks of the volume that clients use: some at the start, some around the edges of regions
/// and shards, the rest anywhere; in runs of up to four.
#[must_use]
pub fn hot_blocks(options: &Options, random: &mut Random) -> Vec<u64> {
    let shard = options.regions * REGION_BLOCKS;
    let total = options.shards * shard;
    let mut blocks = Vec::new();
    while (blocks.len() as u64) < options.hot_blocks {
        let start = match random.below(4) {
            0 => random.below(options.shards) * shard,
            1 => random.below(total / REGION_BLOCKS) * REGION_BLOCKS + REGION_BLOCKS - 2,
            _ => random.below(total),
        };
        for block in start..(start + 4).min(total) {
            if !blocks.contains(&block) && (blocks.len() as u64) < options.hot_blocks {
                blocks.push(block);
            }
        }
    }
    blocks.sort_unstable();
    blocks
}

/// What a client asks next.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What it does.
    pub kind: Kind,
    /// First block of the volume.
    pub first: u64,
    /// One per block: what it writes, or zeros.
    pub values: Vec<u64>,
}

/// One client.
pub struct Client {
    /// Its number, from 1; also that of its session.
    pub id: u64,
    /// The machine.
    pub session: Session,
    /// Requests so far.
    pub requests: u64,
    /// Requests without reply.
    pub open: u64,
}

impl Client {
    /// A client that opens the volume.
    #[must_use]
    pub fn new(id: u64, now: Tick, conf: VolumeConf, out: &mut Vec<Effect>) -> Client {
        let options = session::Options {
            cluster_id: CLUSTER,
            io_timeout_nanos: None,
            generation_start: id * 1_000_000,
        };
        Client { id, session: Session::new(now, options, conf, out), requests: 0, open: 0 }
    }

    /// Choose a request.
    pub fn choose(&mut self, options: &Options, hot: &[u64], random: &mut Random) -> Asked {
        self.requests += 1;
        let at = random.below(hot.len() as u64) as usize;
        let most = if random.below(3) == 0 { 4 } else { 1 };
        let run = hot[at..].iter().zip(hot[at]..).take_while(|&(&block, next)| block == next);
        let count = run.take(most).count() as u64;
        let chance = random.below(100);
        let kind = if chance < options.write_percent {
            Kind::Write
        } else if chance < options.write_percent + options.zero_percent {
            Kind::Zero
        } else if random.below(50) == 0 {
            Kind::Flush
        } else {
            Kind::Read
        };
        let value = |block: u64| match kind {
            // Client, request and place: no two blocks are ever equal, and people can read it.
            Kind::Write => self.id << 56 | self.requests << 16 | (block + 1),
            Kind::Zero | Kind::Read | Kind::Flush => 0,
        };
        Asked { kind, first: hot[at], values: (0..count).map(value).collect() }
    }

    /// The request for the session.
    #[must_use]
    pub fn request(&self, asked: &Asked, pool: &Pool, random: &mut Random) -> BlockRequest {
        let offset = asked.first * BLOCK_BYTES as u64;
        let len = asked.values.len() as u64 * BLOCK_BYTES as u64;
        let op = match asked.kind {
            Kind::Read => BlockOp::Read { offset, len: u32::try_from(len).expect("few blocks") },
            Kind::Write => {
                let data = proto::block::single(content::fill(pool, &asked.values));
                BlockOp::Write { offset, data }
            }
            Kind::Zero if random.below(2) == 0 => BlockOp::Discard { offset, len },
            Kind::Zero => BlockOp::WriteZeroes { offset, len, keep_allocated: false },
            Kind::Flush => BlockOp::Flush,
        };
        BlockRequest { id: self.requests, op }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hot_blocks_are_as_many_as_asked_and_inside_the_volume() {
        for seed in 0..50 {
            let mut options = Options::calm();
            options.hot_blocks = 1 + seed;
            let blocks = hot_blocks(&options, &mut Random::new(seed));
            assert_eq!(blocks.len() as u64, options.hot_blocks);
            let total = options.shards * options.regions * REGION_BLOCKS;
            assert!(blocks.windows(2).all(|pair| pair[0] < pair[1]));
            assert!(blocks.iter().all(|&block| block < total));
        }
    }

    #[test]
    fn every_written_block_has_a_value_of_its_own() {
        let options = Options::calm();
        let mut random = Random::new(4);
        let hot = hot_blocks(&options, &mut random);
        let conf = ShardConf::first(
            crate::store::shard_id(0),
            (1, 1),
            0,
            vec![shard::conf::Member {
                copy: 0,
                store: 1,
                incarnation: 1,
                disk: [1; 16],
                format_uuid: [1; 16],
            }],
            (1, 1),
        );
        let conf = volume_conf(1, &options, &[conf.expect("sound")]);
        let mut client = Client::new(1, Tick(1), conf, &mut Vec::new());
        let mut seen = std::collections::BTreeSet::new();
        let mut kinds = [0; 4];
        for _ in 0..2_000 {
            let asked = client.choose(&options, &hot, &mut random);
            kinds[asked.kind as usize] += 1;
            assert!((1..=4).contains(&asked.values.len()));
            for value in asked.values.iter().filter(|&&value| value != 0) {
                assert!(seen.insert(*value), "{value:#x} twice");
            }
        }
        assert!(kinds.iter().all(|&count| count > 5), "{kinds:?}");
    }
}
