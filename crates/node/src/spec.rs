//! A volume's description from what a program has: numbers, bytes and addresses as text.

use crate::{ClientProblem, VolumeSpec};
use proto::wire::SignedTicket;
use proto::{Epoch, VolumeId};
use shard::session::{ShardRoute, Target};
use std::net::{SocketAddr, ToSocketAddrs};

/// Who serves one shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardSpec {
    /// Position in the volume.
    pub index: u32,
    /// Of the configuration that says so.
    pub epoch: u64,
    /// `host:port` of its primary; an IPv6 address in brackets.
    pub address: String,
    /// Lane of the store that holds it.
    pub lane: u32,
}

/// Check a description, and look up addresses that are names. May block for that.
pub fn volume_spec(
    volume_id: u64,
    sizes: (u64, u64),
    attach_epoch: u64,
    ticket: &[u8],
    shards: &[ShardSpec],
) -> Result<VolumeSpec, ClientProblem> {
    let ticket = SignedTicket::from_bytes(ticket)?;
    let route = |shard: &ShardSpec| {
        let target = Target { address: resolve(&shard.address)?, lane: shard.lane };
        Ok(ShardRoute { index: shard.index, epoch: Epoch(shard.epoch), target })
    };
    let shards = shards.iter().map(route).collect::<Result<Vec<_>, ClientProblem>>()?;
    Ok(VolumeSpec::new(VolumeId(volume_id), sizes, attach_epoch, ticket, shards)?)
}

fn resolve(address: &str) -> Result<SocketAddr, ClientProblem> {
    if let Ok(address) = address.parse() {
        return Ok(address);
    }
    let found = address.to_socket_addrs().map_err(|source| ClientProblem::Address {
        address: address.to_owned(),
        reason: source.to_string(),
    })?;
    found.into_iter().next().ok_or_else(|| ClientProblem::Address {
        address: address.to_owned(),
        reason: "the name has no address".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Status;
    use proto::wire::{Rights, Ticket};

    fn make(ticket: &[u8], address: &str) -> Result<VolumeSpec, ClientProblem> {
        let shard = ShardSpec { index: 0, epoch: 1, address: address.to_owned(), lane: 0 };
        volume_spec(7, (1 << 20, 1 << 20), 1, ticket, &[shard])
    }

    #[test]
    fn tickets_and_addresses_are_checked_at_the_door() {
        let ticket = Ticket {
            volume: VolumeId(7),
            attach_epoch: 1,
            session: 2,
            expires: 3,
            rights: Rights::READ,
        };
        let ticket = SignedTicket { ticket, mac: [0; 32] }.to_bytes();
        for address in ["127.0.0.1:7162", "[::1]:7162", "localhost:7162"] {
            assert_eq!(make(&ticket, address).expect("right").size_bytes(), 1 << 20);
        }
        for address in ["127.0.0.1", "", "7162", "127.0.0.1:70000"] {
            let problem = make(&ticket, address).expect_err("no address");
            assert_eq!(problem.status(), Status::Invalid, "{problem}");
        }
        assert_eq!(make(&ticket[1..], "[::1]:1").expect_err("short").status(), Status::Invalid);
    }
}
