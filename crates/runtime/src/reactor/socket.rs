//! Making sockets: the options that every stream of ours has.

use super::context::Address;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Silence after which the kernel asks a TCP peer whether it is there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
/// Time between such questions.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// Unanswered questions that end a connection: half-open ones are found within 30 s. Where seconds
/// matter (between stores), the protocol has heartbeats of its own.
const KEEPALIVE_COUNT: u32 = 3;
/// Time that sent bytes may stay unacknowledged, in milliseconds. The same 30 s.
const USER_TIMEOUT_MS: u32 = 30_000;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Set the options of a connected stream socket: non-blocking; on TCP no Nagle, and keepalive.
pub(super) fn prepare(socket: &OwnedFd) -> io::Result<()> {
    rustix::io::ioctl_fionbio(socket, true)?;
    let domain = sockopt::socket_domain(socket)?;
    if domain == AddressFamily::INET || domain == AddressFamily::INET6 {
        sockopt::set_tcp_nodelay(socket, true)?;
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(socket, KEEPALIVE_COUNT)?;
        sockopt::set_tcp_user_timeout(socket, USER_TIMEOUT_MS)?;
    }
    Ok(())
}

/// Begin to connect; true if that was all.
pub(super) fn connect(address: &Address) -> io::Result<(OwnedFd, bool)> {
    let family = match address {
        Address::Tcp(SocketAddr::V4(_)) => AddressFamily::INET,
        Address::Tcp(SocketAddr::V6(_)) => AddressFamily::INET6,
        Address::Unix(_) => AddressFamily::UNIX,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    prepare(&socket)?;
    let answer = match address {
        Address::Tcp(address) => rustix::net::connect(&socket, address),
        Address::Unix(path) => rustix::net::connect(&socket, &SocketAddrUnix::new(path)?),
    };
    match answer {
        Ok(()) => Ok((socket, true)),
        Err(Errno::INPROGRESS) => Ok((socket, false)),
        Err(errno) => Err(errno.into()),
    }
}

/// Listen on a TCP address; the address in use comes back, for port 0.
pub(super) fn listen(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // A restarted store must get its port back although old connections linger in TIME_WAIT.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    let bound = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?;
    Ok((socket, bound))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_send_at_once_and_notice_a_dead_peer() {
        let (socket, address) = listen(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
        let (client, _) = connect(&Address::Tcp(address)).expect("begun");
        for stream in [rustix::net::accept(&socket).expect("accepted"), client] {
            prepare(&stream).expect("prepared");
            assert!(sockopt::tcp_nodelay(&stream).expect("asked"));
            assert!(sockopt::socket_keepalive(&stream).expect("asked"));
            assert_eq!(sockopt::tcp_keepidle(&stream).expect("asked"), KEEPALIVE_IDLE);
            assert_eq!(sockopt::tcp_user_timeout(&stream).expect("asked"), USER_TIMEOUT_MS);
            let flags = rustix::fs::fcntl_getfl(&stream).expect("asked");
            assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
        }
    }
}
