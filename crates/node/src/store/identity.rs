//! Stores prove to one another that they hold the cluster key.
//!
//! Three messages (docs/reference/pfw.md): HELLO with the caller's nonce; its reply with the called
//! side's nonce and proof; a second HELLO with the caller's proof. A proof is an HMAC-SHA256 under the
//! cluster key over everything that both sides have said, and over which side it is: neither can be
//! made to sign what the other needs.

use hmac::{Hmac, KeyInit, Mac};
use proto::wire::{Kind, Peer};
use sha2::Sha256;

/// Who this store is.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) store: u64,
    pub(super) incarnation: u64,
    pub(super) cluster_id: [u8; 16],
    pub(super) cluster_key: Vec<u8>,
}

/// Which side of a connection proves.
#[derive(Clone, Copy)]
pub(super) enum Prover {
    Caller,
    Called,
}

/// Fresh random bytes.
pub(super) fn nonce() -> [u8; 32] {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).expect("the kernel gives random bytes");
    nonce
}

impl Identity {
    /// What this side says of itself.
    pub(super) fn peer(&self, nonce: [u8; 32], proof: [u8; 32]) -> Peer {
        Peer { store: self.store, incarnation: self.incarnation, nonce, proof }
    }

    fn mac(&self, kind: Kind, prover: Prover, caller: &Peer, called: &Peer) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.cluster_key).expect("any length");
        let side = match prover {
            Prover::Caller => 1,
            Prover::Called => 2,
        };
        mac.update(b"pureflash peer");
        mac.update(&self.cluster_id);
        mac.update(&[kind as u8, side]);
        for peer in [caller, called] {
            mac.update(&peer.store.to_le_bytes());
            mac.update(&peer.incarnation.to_le_bytes());
            mac.update(&peer.nonce);
        }
        mac
    }

    /// The proof of one side of a connection.
    pub(super) fn prove(
        &self,
        kind: Kind,
        prover: Prover,
        caller: &Peer,
        called: &Peer,
    ) -> [u8; 32] {
        self.mac(kind, prover, caller, called).finalize().into_bytes().into()
    }

    /// Whether a proof is right, in constant time.
    pub(super) fn verify(
        &self,
        kind: Kind,
        prover: Prover,
        (caller, called): (&Peer, &Peer),
        proof: &[u8; 32],
    ) -> bool {
        self.mac(kind, prover, caller, called).verify_slice(proof).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_of_one_key_kind_side_and_pair_of_nonces() {
        let identity = Identity {
            store: 1,
            incarnation: 5,
            cluster_id: [3; 16],
            cluster_key: b"key".to_vec(),
        };
        let (caller, called) = (identity.peer([1; 32], [0; 32]), identity.peer([2; 32], [0; 32]));
        let proof = identity.prove(Kind::Peer, Prover::Caller, &caller, &called);
        let holds = |identity: &Identity, kind, prover, caller: &Peer, called: &Peer| {
            identity.verify(kind, prover, (caller, called), &proof)
        };
        assert!(holds(&identity, Kind::Peer, Prover::Caller, &caller, &called));
        assert!(!holds(&identity, Kind::Heartbeat, Prover::Caller, &caller, &called));
        assert!(!holds(&identity, Kind::Peer, Prover::Called, &caller, &called));
        assert!(!holds(&identity, Kind::Peer, Prover::Caller, &called, &caller));
        let other = Identity { cluster_key: b"another".to_vec(), ..identity.clone() };
        assert!(!holds(&other, Kind::Peer, Prover::Caller, &caller, &called));
        let later = identity.peer(nonce(), [0; 32]);
        assert!(!holds(&identity, Kind::Peer, Prover::Caller, &caller, &later));
    }
}
