//! The reactor against real sockets: loopback TCP and socket pairs.

use super::testing::*;
use super::*;
use crate::engine::{Mem, MemDisk};
use proto::disk::{DiskOp, DiskRequest, IoId};
use proto::frame::OutFrame;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;

fn mixed_stream(seed: u64) -> Vec<u8> {
    let mut draw = random(seed);
    let mut stream = Vec::new();
    for tag in 0..5 + draw(40) as u32 {
        let meta = [0, 4, 40, 200][draw(4)];
        let payload = [0, 512, 4096, 4096, 4096, 20_000, 70_000, 1_100_000][draw(8)];
        stream.extend(frame_bytes(tag, meta, payload));
    }
    stream
}

#[test]
fn frames_survive_any_cutting_of_the_stream() {
    let server = Server::start();
    for seed in 1..=30 {
        let stream = mixed_stream(seed);
        let largest = [1 << 30, 50_000, 3_000][seed as usize % 3];
        let mut draw = random(seed);
        let next_size = move || 1 + draw(largest);
        if seed % 2 == 0 {
            exchange(&server.tcp().0, &stream, next_size);
        } else {
            exchange(&server.unix().0, &stream, next_size);
        }
        assert!(matches!(server.next(), Told::Closed(_, CloseReason::PeerClosed)), "{seed}");
    }
}

#[test]
fn the_smallest_pieces_make_the_same_frames() {
    let server = Server::start();
    let stream: Vec<u8> = (0..20).flat_map(|tag| frame_bytes(tag, 4, 50)).collect();
    exchange(&server.tcp().0, &stream, || 1);
}

#[test]
fn the_largest_payload_passes() {
    let server = Server::start();
    let stream = frame_bytes(1, 32, 32 << 20);
    exchange(&server.tcp().0, &stream, || 1 << 30);
    assert!(matches!(server.next(), Told::Closed(_, CloseReason::PeerClosed)));
    exchange(&server.unix().0, &stream, || 1 << 30);
}

/// More frames in one piece than a connection's share of an iteration: the rest waits in our own
/// buffer, about which no event will ever come.
#[test]
fn a_burst_is_served_in_several_shares() {
    let server = Server::start();
    let burst: Vec<u8> =
        (0..10 * FRAMES_PER_TURN as u32).flat_map(|n| frame_bytes(n, 0, 0)).collect();
    let (client, _) = server.unix();
    for _ in 0..20 {
        exchange(&client, &burst, || 1 << 20);
    }
    let metrics = server.handle.metrics();
    assert!(metrics.loops.get() >= 200, "{} iterations", metrics.loops.get());
    assert!(metrics.late_wakes.get() < 10, "{} shares came late", metrics.late_wakes.get());
}

#[test]
fn many_connections_are_served_side_by_side() {
    let server = Server::start();
    let address = server.listen();
    let clients: Vec<_> = (0..200).map(|_| TcpStream::connect(address).expect("c")).collect();
    for (n, mut client) in clients.iter().enumerate() {
        client.write_all(&frame_bytes(n as u32, 8, 4096)).expect("sent");
    }
    for (n, mut client) in clients.iter().enumerate().rev() {
        let expected = frame_bytes(n as u32, 8, 4096);
        let mut back = vec![0; expected.len()];
        client.read_exact(&mut back).expect("answered");
        assert!(back == expected, "connection {n} got another one's reply");
    }
    assert_eq!(server.handle.metrics().connections.get(), 200);
    drop(clients);
    let closed = (0..400).filter(|_| matches!(server.next(), Told::Closed(..))).count();
    assert_eq!(closed, 200, "and as many were accepted");
    assert_eq!(server.handle.metrics().connections.get(), 0);
}

/// Performance rule of the fast path: one system call per batch, not per request.
#[test]
fn a_full_pipe_costs_a_fraction_of_a_system_call_per_request() {
    let server = Server::start();
    let (mut client, _) = server.tcp();
    let batch: Vec<u8> = (0..32).flat_map(|tag| frame_bytes(tag, 0, 4096)).collect();
    let mut back = vec![0; batch.len()];
    for _ in 0..100 {
        client.write_all(&batch).expect("sent");
        client.read_exact(&mut back).expect("answered");
    }
    let metrics = server.handle.metrics();
    assert_eq!(metrics.received_frames.get(), 3200);
    let calls = metrics.receive_calls.get() + metrics.send_calls.get();
    assert!(calls < 3200 / 2, "{calls} calls for 3200 writes of 4 KiB echoed");
}

#[test]
fn an_end_inside_a_frame_is_told_from_an_end_between_frames() {
    let server = Server::start();
    let whole = frame_bytes(1, 8, 4096);
    for kept in [1, HEADER_BYTES, HEADER_BYTES + 4, HEADER_BYTES + 8, whole.len() - 1] {
        let (mut client, id) = server.tcp();
        client.write_all(&whole).expect("sent");
        client.write_all(&whole[..kept]).expect("sent");
        client.shutdown(Shutdown::Write).expect("half closed");
        let mut back = Vec::new();
        client.read_to_end(&mut back).expect("the whole frame is answered, then the end");
        assert!(back == whole);
        assert_eq!(server.next(), Told::Closed(id, CloseReason::PeerClosedInsideFrame), "{kept}");
    }
    let (client, id) = server.unix();
    drop(client);
    assert_eq!(server.next(), Told::Closed(id, CloseReason::PeerClosed));
}

#[test]
fn a_reset_is_reported_with_its_errno() {
    let server = Server::start();
    let (client, id) = server.tcp();
    // Linger 0: close sends a reset.
    sockopt::set_socket_linger(&client, Some(Duration::ZERO)).expect("set");
    drop(client);
    assert_eq!(server.next(), Told::Closed(id, CloseReason::Failed(libc::ECONNRESET)));
}

#[test]
fn a_protocol_error_ends_the_connection_after_the_frames_before_it() {
    let server = Server::start();
    let (mut client, id) = server.tcp();
    let good = frame_bytes(1, 0, 100);
    let mut stream = good.clone();
    stream.extend([0xFF; HEADER_BYTES]);
    client.write_all(&stream).expect("sent");
    let told = server.next();
    let Told::Closed(closed, reason) = told else { panic!("{told:?}") };
    assert_eq!(closed, id);
    assert_eq!(reason.to_string(), "protocol error: magic 0xffffffff, expected 0x5afec0de");
    let mut back = Vec::new();
    client.read_to_end(&mut back).expect("answered and closed");
    assert!(back == good);
    // Too large is refused before anything is allocated or received.
    let (mut client, _) = server.tcp();
    client.write_all(&frame_bytes(1, 0, 0)[..12]).expect("sent");
    client.write_all(&u32::MAX.to_le_bytes()).expect("sent");
    assert!(matches!(server.next(), Told::Closed(_, CloseReason::Framing(_))));
}

#[test]
fn a_slow_client_is_closed_at_its_deadline_and_a_quick_one_is_not() {
    let server = Server::start();
    let (_slow, slow) = server.tcp();
    let (quick, quick_id) = server.tcp();
    server.call(move |_, ctx| {
        let soon = ctx.now().after_millis(5);
        ctx.set_conn_deadline(quick_id, Some(soon));
        ctx.set_conn_deadline(slow, Some(ctx.now().after_millis(HANDSHAKE_MS)));
        ctx.set_conn_deadline(slow, Some(soon));
        ctx.set_conn_deadline(quick_id, None);
        ctx.set_timer(Some(ctx.now().after_millis(10)));
    });
    assert_eq!(server.next(), Told::Closed(slow, CloseReason::Deadline));
    assert_eq!(server.next(), Told::Timer);
    exchange(&quick, &frame_bytes(1, 0, 64), || 1 << 20);
}

#[test]
fn a_timer_comes_once_and_the_last_one_set_counts() {
    let server = Server::start();
    server.call(|_, ctx| {
        ctx.set_timer(Some(ctx.now()));
        ctx.set_timer(Some(ctx.now().after_millis(1)));
    });
    assert_eq!(server.next(), Told::Timer);
    server.call(|_, ctx| {
        ctx.set_timer(Some(ctx.now()));
        ctx.set_timer(None);
    });
    // Two more iterations, of which the first would have called the timer.
    server.call(|_, _| ());
    server.call(|_, _| ());
    assert!(server.told.try_recv().is_err());
}

#[test]
fn a_paused_connection_holds_its_peer_back() {
    let server = Server::start();
    let (mut client, id) = server.unix();
    server.call(move |_, ctx| ctx.pause(id));
    client.set_nonblocking(true).expect("set");
    let stream: Vec<u8> = (0..2000).flat_map(|tag| frame_bytes(tag, 0, 4096)).collect();
    let mut sent = 0;
    let blocked = loop {
        match client.write(&stream[sent..]) {
            Ok(count) => sent += count,
            Err(error) => break error.kind(),
        }
    };
    assert_eq!(blocked, ErrorKind::WouldBlock);
    assert!(sent < 4 << 20, "{sent} bytes went into a paused connection");
    assert_eq!(server.call(|_, ctx| ctx.shared.metrics.received_frames.get()), 0);
    server.call(move |_, ctx| ctx.resume(id));
    client.set_nonblocking(false).expect("set");
    let (rest, reader) = (&stream[sent..], client.try_clone().expect("cloned"));
    std::thread::scope(|scope| {
        scope.spawn(move || client.write_all(rest).expect("the server reads again"));
        let mut back = vec![0; stream.len()];
        (&reader).read_exact(&mut back).expect("answered");
        assert!(back == stream);
    });
}

/// Pausing in the middle of a batch keeps the rest of the batch, in order.
#[test]
fn a_pause_stops_the_very_next_frame() {
    let server = Server::start();
    let (mut client, id) = server.unix();
    server.call(|echo, _| {
        (echo.tells_frames, echo.pauses_after_each, echo.is_echoing) = (true, true, false);
    });
    let batch: Vec<u8> = (0..5).flat_map(|tag| frame_bytes(tag, 0, 10)).collect();
    client.write_all(&batch).expect("sent");
    for tag in 0..5 {
        assert_eq!(server.next(), Told::Frame(tag));
        // Two iterations in which the next frame could have come.
        server.call(|_, _| ());
        server.call(|_, _| ());
        assert!(server.told.try_recv().is_err(), "paused after {tag}");
        server.call(move |_, ctx| ctx.resume(id));
    }
    server.call(move |_, ctx| ctx.pause(id));
    drop(client);
    // A peer that is gone is noticed although nothing is received.
    assert_eq!(server.next(), Told::Closed(id, CloseReason::PeerClosed));
}

#[test]
fn a_peer_that_never_reads_loses_its_connection_only() {
    let server = Server::start();
    let (greedy, id) = server.tcp();
    let (polite, _) = server.tcp();
    let flood = frame_bytes(1, 0, 1 << 20);
    greedy.set_write_timeout(Some(Duration::from_secs(60))).expect("set");
    // The server goes on reading, so this ends when it closes the connection.
    while (&greedy).write_all(&flood).is_ok() {}
    assert_eq!(server.next(), Told::Closed(id, CloseReason::SendQueueFull));
    exchange(&polite, &frame_bytes(2, 0, 4096), || 1 << 20);
}

#[test]
fn a_finished_connection_delivers_its_last_frames_first() {
    let server = Server::start();
    let (mut client, id) = server.tcp();
    let farewell = 8 << 20;
    server.call(move |_, ctx| {
        let piece = ctx.pool().zeroed(1 << 20).freeze();
        let mut frame =
            OutFrame { payload: (0..8).map(|_| piece.clone()).collect(), ..OutFrame::default() };
        frame.head.push(7);
        ctx.send(id, frame).expect("room");
        ctx.finish(id);
        assert_eq!(ctx.send(id, OutFrame::default()), Err(SendError::Gone));
    });
    // What the client still sends is thrown away, and must not cost it the farewell.
    client.write_all(&frame_bytes(1, 0, 100_000)).expect("sent");
    let mut back = Vec::new();
    client.read_to_end(&mut back).expect("all of it, then the end");
    assert_eq!(back.len(), farewell + 1);
    drop(client);
    assert_eq!(server.next(), Told::Closed(id, CloseReason::Requested));
    // A client that stays is not waited for longer than FINISH_MS.
    let (_stays, id) = server.tcp();
    server.call(move |_, ctx| ctx.finish(id));
    assert_eq!(server.next(), Told::Closed(id, CloseReason::Requested));
}

#[test]
fn a_close_is_reported_once_and_the_id_is_dead() {
    let server = Server::start();
    let (mut client, id) = server.unix();
    server.call(move |_, ctx| {
        let mut last = OutFrame::default();
        last.head.extend_from_slice(b"bye");
        ctx.send(id, last).expect("room");
        ctx.close(id);
        ctx.close(id);
        ctx.finish(id);
    });
    assert_eq!(server.next(), Told::Closed(id, CloseReason::Requested));
    let mut back = Vec::new();
    client.read_to_end(&mut back).expect("closed");
    assert_eq!(back, b"bye");
    let (_other, other_id) = server.unix();
    assert_ne!(id, other_id);
    server.call(move |_, ctx| {
        assert_eq!(ctx.send(id, OutFrame::default()), Err(SendError::Gone));
        assert_eq!(ctx.send_queue_bytes(id), 0);
        ctx.close(id);
        ctx.resume(id);
        ctx.set_conn_deadline(id, Some(ctx.now()));
    });
    server.call(|_, _| ());
    assert!(server.told.try_recv().is_err());
}

#[test]
fn connections_are_made_from_inside() {
    let server = Server::start();
    let peer = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = peer.local_addr().expect("bound");
    let id = server.connect(Address::Tcp(address));
    // Sent before the connect is through: kept until it is.
    server.call(move |_, ctx| {
        let mut hello = OutFrame::default();
        hello.head.extend_from_slice(b"hello");
        ctx.send(id, hello).expect("kept");
    });
    let (mut socket, _) = peer.accept().expect("accepted");
    assert_eq!(server.next(), Told::Opened(id, Opened::Connected));
    let mut hello = [0; 5];
    socket.read_exact(&mut hello).expect("arrived");
    assert_eq!(&hello, b"hello");
    exchange(&socket, &frame_bytes(1, 0, 5000), || 1 << 20);
    drop(peer);
    let refused = server.connect(Address::Tcp(address));
    let reason = CloseReason::ConnectFailed(libc::ECONNREFUSED);
    assert_eq!(server.next(), Told::Closed(refused, reason));
    let folder = crate::disk_file::tests::Folder::new();
    // AF_UNIX allows 107 bytes, so the path is taken relative to the working directory.
    let path = pathdiff(&folder.path("s"));
    let peer = std::os::unix::net::UnixListener::bind(&path).expect("bound");
    let id = server.connect(Address::Unix(path));
    let (socket, _) = peer.accept().expect("accepted");
    assert_eq!(server.next(), Told::Opened(id, Opened::Connected));
    exchange(&socket, &frame_bytes(1, 0, 5000), || 1 << 20);
}

/// `path` through the current directory's own descriptor entry, which is short.
fn pathdiff(path: &std::path::Path) -> std::path::PathBuf {
    let here = std::env::current_dir().expect("a working directory");
    match path.strip_prefix(here.ancestors().nth(2).expect("the workspace")) {
        Ok(below) => std::path::Path::new("../..").join(below),
        Err(_) => path.to_owned(),
    }
}

#[test]
fn an_adopted_socket_begins_with_what_was_read_ahead() {
    let server = Server::start();
    let stream: Vec<u8> = (0..12).flat_map(|tag| frame_bytes(tag, 4, 5000)).collect();
    for ahead in [1, 20, 5020, 5021, 60_000, stream.len()] {
        let (mut client, socket) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let leftover = stream[..ahead].to_vec();
        let socket = socket.into();
        let framing = Box::new(TestFraming);
        let adoption = Adoption { socket, framing, leftover, token: ahead as u64 };
        server.handle.adopt(adoption).expect("room");
        client.write_all(&stream[ahead..]).expect("sent");
        let mut back = vec![0; stream.len()];
        client.read_exact(&mut back).expect("answered");
        assert!(back == stream, "{ahead} bytes ahead");
        let how = Opened::Adopted { token: ahead as u64 };
        assert!(matches!(server.next(), Told::Opened(_, found) if found == how));
        drop(client);
        assert!(matches!(server.next(), Told::Closed(_, CloseReason::PeerClosed)));
    }
}

#[test]
fn what_is_no_socket_is_refused_and_counted() {
    let server = Server::start();
    let (socket, _writer) = std::io::pipe().expect("a pipe");
    let framing = Box::new(TestFraming);
    let adoption = Adoption { socket: socket.into(), framing, leftover: Vec::new(), token: 1 };
    server.handle.adopt(adoption).expect("room");
    let (client, _) = server.unix();
    assert_eq!(server.handle.metrics().refused.get(), 1);
    assert_eq!(server.handle.metrics().connections.get(), 1);
    exchange(&client, &frame_bytes(1, 0, 64), || 1 << 20);
}

#[test]
fn a_full_command_queue_gives_the_command_back() {
    let server = Server::with(Vec::new(), 4);
    let (release, held) = mpsc::channel::<()>();
    let (entered, inside) = mpsc::channel();
    let hold = Box::new(move |_: &mut Echo, _: &mut Context| {
        entered.send(()).expect("the test waits");
        held.recv().expect("released");
    });
    assert!(server.handle.try_send(hold).is_ok());
    inside.recv().expect("the reactor is busy now");
    let note =
        |n: usize| Box::new(move |echo: &mut Echo, _: &mut Context| echo.tell(Told::Disk(n)));
    for n in 0..4 {
        assert!(server.handle.try_send(note(n)).is_ok());
    }
    let Err(Refused::Full(command)) = server.handle.try_send(note(4)) else {
        panic!("a fifth command was taken");
    };
    release.send(()).expect("the reactor waits");
    for n in 0..4 {
        assert_eq!(server.next(), Told::Disk(n));
    }
    assert!(server.handle.try_send(command).is_ok(), "what came back can be sent again");
    assert_eq!(server.next(), Told::Disk(4));
}

/// Senders that push while the reactor is falling asleep, as often as it goes. (Order by order, the
/// hand-shake is tested in `handle`.)
#[test]
fn no_command_is_forgotten_by_a_sleeping_reactor() {
    let server = Server::with(Vec::new(), 8);
    let handle = &server.handle;
    let senders: u64 = 3;
    std::thread::scope(|scope| {
        for _ in 0..senders {
            scope.spawn(move || {
                for _ in 0..3000 {
                    let (sender, answer) = mpsc::channel();
                    let mut action: Action = Box::new(move |_: &mut Echo, _: &mut Context| {
                        sender.send(()).expect("the sender waits");
                    });
                    while let Err(refused) = handle.try_send(action) {
                        let Refused::Full(back) = refused else { panic!("stopped") };
                        action = back;
                        std::thread::yield_now();
                    }
                    answer.recv_timeout(Duration::from_secs(60)).expect("handled");
                }
            });
        }
    });
    let metrics = server.handle.metrics();
    assert_eq!(metrics.commands.get(), senders * 3000);
    assert!(metrics.sleeps.get() > 100, "{} sleeps", metrics.sleeps.get());
    assert!(metrics.late_wakes.get() < 10, "{} lost wake-ups", metrics.late_wakes.get());
}

#[test]
fn an_idle_reactor_shows_that_it_lives_and_a_stuck_one_grows_old() {
    let server = Server::start();
    let loops = || server.handle.metrics().loops.get();
    let until = loops() + 3;
    let begun = clock::now();
    while loops() < until {
        assert!(clock::now() < begun.after_millis(60_000), "no tick in a minute");
        std::thread::yield_now();
    }
    let (release, held) = mpsc::channel::<()>();
    let hold = Box::new(move |_: &mut Echo, _: &mut Context| held.recv().expect("released"));
    assert!(server.handle.try_send(hold).is_ok());
    while server.handle.age_nanos(clock::now()) < 3 * IDLE_TICK_MS * 1_000_000 {
        std::thread::yield_now();
    }
    release.send(()).expect("the reactor waits");
    server.call(|_, _| ());
    assert!(server.handle.age_nanos(clock::now()) < 60_000_000_000);
}

#[test]
fn a_stopped_reactor_refuses_and_closes() {
    let server = Server::start();
    let (mut client, _) = server.unix();
    let handle = server.handle.clone();
    drop(server);
    assert_eq!(client.read(&mut [0; 8]).expect("closed"), 0);
    let refused = handle.try_send(Box::new(|_: &mut Echo, _: &mut Context| ()));
    assert!(matches!(refused, Err(Refused::Stopped(_))));
    let (_, socket) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let framing = Box::new(TestFraming);
    let adoption = Adoption { socket: socket.into(), framing, leftover: Vec::new(), token: 5 };
    assert!(matches!(handle.adopt(adoption), Err(Refused::Stopped(back)) if back.token == 5));
}

#[test]
fn requests_of_one_iteration_reach_the_disk_together() {
    let pool = Pool::new(1 << 20);
    let engine = || {
        let disk = MemDisk::new(1 << 20);
        Box::new(Mem::new(disk, pool.clone()).expect("an engine")) as Box<dyn DiskEngine>
    };
    let server = Server::with(vec![engine(), engine()], 16);
    let idles = server.call(|echo, ctx| {
        for n in 0..200 {
            let op = DiskOp::Read { offset: 4096 * (n % 256), len: 4096 };
            ctx.queue_disk(DiskIndex(n as usize % 2), DiskRequest { id: IoId(n), op });
        }
        echo.idles
    });
    let mut seen: Vec<_> = (0..200)
        .map(|_| {
            let told = server.next();
            let Told::Disk(n) = told else { panic!("{told:?}") };
            n
        })
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..200).collect::<Vec<_>>());
    let counts = server.call(move |echo, ctx| {
        let reads = |disk| ctx.disk_counters(DiskIndex(disk)).reads;
        (ctx.disks(), reads(0), reads(1), echo.idles - idles)
    });
    assert_eq!(counts, (2, 100, 100, 2), "submitted after one idle, completed before the next");
    assert_eq!(server.handle.metrics().disk_done.get(), 200);
}

/// Every engine under the real loop: requests wake a sleeping reactor when they complete.
#[test]
fn completions_wake_a_sleeping_reactor() {
    use crate::disk_file::{DiskFile, create_sparse, tests::Folder};
    use crate::engine::{EngineChoice, open};
    let folder = Folder::new();
    let path = folder.path("disk0.img");
    create_sparse(&path, 1 << 20).expect("a file");
    let disk = DiskFile::open(&path).expect("a disk");
    let pool = Pool::new(1 << 20);
    for choice in [EngineChoice::Threads, EngineChoice::Aio, EngineChoice::Auto] {
        let (engine, _) = open(choice, &disk, &pool, 8).expect("an engine");
        let server = Server::with(vec![engine], 16);
        for n in 0..300u64 {
            let data = std::iter::once(pool.zeroed(4096).freeze()).collect();
            let op = match n % 3 {
                0 => DiskOp::Write { offset: n * 512 / 4096 * 4096, data },
                1 => DiskOp::Flush,
                _ => DiskOp::Read { offset: 0, len: 4096 },
            };
            server.call(move |_, ctx| {
                ctx.queue_disk(DiskIndex(0), DiskRequest { id: IoId(n), op });
            });
            assert_eq!(server.next(), Told::Disk(n as usize));
        }
        let late = server.handle.metrics().late_wakes.get();
        assert!(late < 10, "{late} completions were found by the idle tick");
    }
}

#[test]
fn listening_twice_on_one_port_is_an_error() {
    let server = Server::start();
    let address: SocketAddr = server.listen();
    let error = server.call(move |_, ctx| ctx.listen(address).expect_err("taken"));
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
}
