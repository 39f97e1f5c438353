//! The attach ticket: the conductor's word that a session may use a volume.
//!
//! Only the bytes are here. The MAC is HMAC-SHA256 under the cluster key over the 36 ticket bytes;
//! making and verifying it is the business of whoever holds the key.

use super::{ID_LIMIT, WireError, raw};
use crate::VolumeId;
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of the HMAC-SHA256 beside a ticket.
pub const TICKET_MAC_BYTES: usize = 32;

/// What a session may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rights(u32);

impl Rights {
    /// Read, flush.
    pub const READ: Rights = Rights(1);
    /// Read and everything that changes data.
    pub const READ_WRITE: Rights = Rights(3);

    /// Whether writes are allowed.
    #[must_use]
    pub fn may_write(self) -> bool {
        self == Rights::READ_WRITE
    }

    fn parse(bits: u32) -> Result<Rights, WireError> {
        match bits {
            1 => Ok(Rights::READ),
            3 => Ok(Rights::READ_WRITE),
            // Write without read is nothing that a block device can be.
            other => Err(WireError::Field { name: "ticket.rights", value: other.into() }),
        }
    }
}

/// The signed statement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticket {
    /// The volume that may be used.
    pub volume: VolumeId,
    /// Valid until a newer attach.
    pub attach_epoch: u64,
    /// Who may use it; fixed for the life of the connection.
    pub session: u64,
    /// Seconds since 1970 (UTC); later the ticket opens no new connection.
    pub expires: u64,
    /// What may be done.
    pub rights: Rights,
}

/// A ticket and its HMAC, not yet verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SignedTicket {
    /// The statement.
    pub ticket: Ticket,
    /// HMAC-SHA256 of [`Ticket::signed_bytes`] under the cluster key.
    pub mac: [u8; TICKET_MAC_BYTES],
}

/// Bytes of a ticket and its MAC, as in HELLO.
pub const SIGNED_TICKET_BYTES: usize = size_of::<raw::Ticket>() + TICKET_MAC_BYTES;

impl SignedTicket {
    /// Read the bytes of a ticket and its MAC. Who holds no key trusts them as they are.
    pub fn from_bytes(bytes: &[u8]) -> Result<SignedTicket, WireError> {
        let short = WireError::Truncated {
            what: "ticket",
            expected: SIGNED_TICKET_BYTES as u64,
            found: bytes.len() as u64,
        };
        let bytes: &[u8; SIGNED_TICKET_BYTES] = bytes.try_into().map_err(|_| short)?;
        let (ticket, mac) = bytes.split_at(size_of::<raw::Ticket>());
        let ticket = raw::Ticket::read_from_bytes(ticket).expect("split at its size");
        let mac = mac.try_into().expect("the rest is the MAC");
        Ok(SignedTicket { ticket: Ticket::from_raw(&ticket)?, mac })
    }

    /// The inverse of [`SignedTicket::from_bytes`].
    #[must_use]
    pub fn to_bytes(&self) -> [u8; SIGNED_TICKET_BYTES] {
        let mut bytes = [0; SIGNED_TICKET_BYTES];
        let (ticket, mac) = bytes.split_at_mut(size_of::<raw::Ticket>());
        ticket.copy_from_slice(&self.ticket.signed_bytes());
        mac.copy_from_slice(&self.mac);
        bytes
    }
}

impl Ticket {
    /// The bytes that the MAC covers, which are also the bytes on the wire.
    #[must_use]
    pub fn signed_bytes(&self) -> [u8; size_of::<raw::Ticket>()] {
        let raw = self.to_raw();
        raw.as_bytes().try_into().expect("as long as itself")
    }

    pub(super) fn to_raw(self) -> raw::Ticket {
        raw::Ticket {
            volume: self.volume.0.into(),
            attach_epoch: self.attach_epoch.into(),
            session: self.session.into(),
            expires: self.expires.into(),
            rights: self.rights.0.into(),
        }
    }

    pub(super) fn from_raw(raw: &raw::Ticket) -> Result<Ticket, WireError> {
        let volume = raw.volume.get();
        if volume >= ID_LIMIT {
            return Err(WireError::Field { name: "ticket.volume", value: volume });
        }
        Ok(Ticket {
            volume: VolumeId(volume),
            attach_epoch: raw.attach_epoch.get(),
            session: raw.session.get(),
            expires: raw.expires.get(),
            rights: Rights::parse(raw.rights.get())?,
        })
    }
}
