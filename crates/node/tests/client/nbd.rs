//! A raw NBD client in the transmission phase, simple replies. Every wait is bounded.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const ZEROES: u16 = 6;

/// Far above what anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Client {
    stream: UnixStream,
    /// Bytes that the reply to a cookie brings if it succeeds.
    asked: BTreeMap<u64, usize>,
    next_cookie: u64,
}

impl Client {
    /// A client, and the socket that the gateway adopts.
    pub fn pair() -> (Client, OwnedFd) {
        let (stream, other) = UnixStream::pair().expect("sockets");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        stream.set_write_timeout(Some(PATIENCE)).expect("set");
        (Client { stream, asked: BTreeMap::new(), next_cookie: 1 }, other.into())
    }

    pub fn header(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend(0u16.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    }

    /// Send a request; its cookie comes back.
    pub fn ask(&mut self, command: u16, offset: u64, length: u32, data: &[u8]) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut bytes = Client::header(command, cookie, offset, length);
        bytes.extend_from_slice(data);
        self.raw(&bytes);
        self.expect_reply(cookie, if command == READ { length as usize } else { 0 });
        cookie
    }

    pub fn expect_reply(&mut self, cookie: u64, bytes: usize) {
        self.asked.insert(cookie, bytes);
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the gateway reads");
    }

    /// The next reply: cookie, error, data.
    pub fn reply(&mut self) -> (u64, u32, Vec<u8>) {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).expect("a reply comes");
        assert_eq!(header[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(header[4..8].try_into().expect("4"));
        let cookie = u64::from_be_bytes(header[8..].try_into().expect("8"));
        let bytes = self.asked.remove(&cookie).expect("one reply to each request");
        let mut data = vec![0; if error == 0 { bytes } else { 0 }];
        self.stream.read_exact(&mut data).expect("as much as it says");
        (cookie, error, data)
    }

    /// One request by itself.
    pub fn run(&mut self, command: u16, offset: u64, length: u32, data: &[u8]) -> (u32, Vec<u8>) {
        let cookie = self.ask(command, offset, length, data);
        let (answered, error, data) = self.reply();
        assert_eq!(answered, cookie);
        (error, data)
    }

    /// The error of a request that is answered although others wait.
    pub fn run_refused(&mut self) -> u32 {
        let cookie = self.ask(READ, 0, 512, &[]);
        let (answered, error, _) = self.reply();
        assert_eq!(answered, cookie);
        error
    }

    pub fn outstanding(&self) -> usize {
        self.asked.len()
    }

    /// The gateway has closed the connection, and nothing came before that.
    pub fn expect_end(&mut self) {
        let mut byte = [0];
        assert_eq!(self.stream.read(&mut byte).expect("the end comes"), 0);
    }
}
