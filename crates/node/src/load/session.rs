//! Load on a volume, through a session as every client has one.

use super::{Ask, LoadOptions, LoadProblem, Loop, PendingLoad};
use crate::link::{self, Answer, Link, Outcome};
use crate::{ClientProblem, VolumeSpec};
use crossbeam_channel::bounded;
use proto::Pool;
use proto::block::{BlockOp, BlockRequest};
use proto::disk::DiskDone;
use proto::frame::Frame;
use proto::id_map::IdMap;
use runtime::reactor::{
    Application, CloseReason, ConnId, Context, DiskIndex, Handle, ListenerId, Opened, Options,
    SPIN_MAX, spawn,
};
use shard::session::PathId;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Free buffers kept, per size class.
const POOL_BYTES: usize = 16 << 20;
/// Id of the first request, which is not measured.
const FIRST: u64 = u64::MAX;

/// A newer description of the volume.
struct Update {
    spec: Box<VolumeSpec>,
    answer: Answer<()>,
}

/// How a load follows its volume.
pub(super) struct News {
    is_wanted: Arc<AtomicBool>,
    handle: Handle<Update>,
}

impl News {
    /// Whether requests have begun to wait for news since this was asked last.
    pub fn is_wanted(&self) -> bool {
        self.is_wanted.swap(false, Ordering::AcqRel)
    }

    /// Pass news on.
    pub fn tell(&self, spec: VolumeSpec) -> Result<(), ClientProblem> {
        let spec = Box::new(spec);
        link::ask(&self.handle, |answer| Update { spec, answer })
    }
}

/// Begin a load on a volume. Requests that cannot be answered now wait, as always; the report comes
/// when the last one is.
pub fn run_volume(
    cluster_id: [u8; 16],
    spec: VolumeSpec,
    load: LoadOptions,
) -> Result<PendingLoad, LoadProblem> {
    if let Some(problem) = load.problem(spec.size_bytes()) {
        return Err(LoadProblem::Options(problem));
    }
    let (answer, result) = bounded(1);
    let pool = Pool::new(POOL_BYTES);
    let options = Options {
        name: "load".to_owned(),
        command_capacity: 1,
        spin: SPIN_MAX,
        pool: pool.clone(),
    };
    let session = link::options(cluster_id, None);
    let is_wanted = Arc::new(AtomicBool::new(false));
    let shown = Arc::clone(&is_wanted);
    let running = spawn(options, Vec::new(), move || App {
        opening: Some((session, spec)),
        link: None,
        work: Loop::new(load, &pool, answer),
        roles: IdMap::default(),
        is_news_wanted: shown,
    })
    .map_err(ClientProblem::from)?;
    let news = News { is_wanted, handle: running.handle };
    Ok(PendingLoad { result, news: Some(news) })
}

struct App {
    /// Taken in `start`.
    opening: Option<(shard::session::Options, VolumeSpec)>,
    link: Option<Link>,
    work: Loop,
    roles: IdMap<ConnId, PathId>,
    is_news_wanted: Arc<AtomicBool>,
}

impl App {
    fn step(&mut self, ctx: &mut Context, act: impl FnOnce(&mut Link, &mut Context, &mut Outcome)) {
        let mut outcome = Outcome::default();
        act(self.link.as_mut().expect("start() is the first call"), ctx, &mut outcome);
        self.follow(ctx, outcome);
    }

    /// Take what a step has brought; each answer begins the next request.
    fn follow(&mut self, ctx: &mut Context, mut outcome: Outcome) {
        loop {
            self.roles.extend(outcome.begun.drain(..));
            if !outcome.conf_needed.is_empty() {
                outcome.conf_needed.clear();
                self.is_news_wanted.store(true, Ordering::Release);
            }
            let replies = std::mem::take(&mut outcome.replies);
            if replies.is_empty() {
                return;
            }
            for (id, result) in replies {
                if let Err(status) = result {
                    self.work.fail(ClientProblem::of_reply(status));
                    return ctx.stop();
                }
                if id == FIRST {
                    self.work.begin();
                    for place in 0..self.work.options.depth {
                        self.ask(ctx, place, &mut outcome);
                    }
                } else {
                    let place = u32::try_from(id).expect("ids are places");
                    self.work.done(place);
                    self.ask(ctx, place, &mut outcome);
                }
            }
            if self.work.is_over() {
                self.work.finish(None);
                return ctx.stop();
            }
        }
    }

    fn ask(&mut self, ctx: &mut Context, place: u32, outcome: &mut Outcome) {
        let Some(Ask { offset, is_read, .. }) = self.work.next(place) else { return };
        let op = if is_read {
            BlockOp::Read { offset, len: self.work.options.block_bytes }
        } else {
            BlockOp::Write { offset, data: self.work.payload.clone() }
        };
        let request = BlockRequest { id: u64::from(place), op };
        self.link.as_mut().expect("started").submit(ctx, request, outcome);
    }
}

impl Application for App {
    type Command = Update;

    fn start(&mut self, ctx: &mut Context) {
        let (options, spec) = self.opening.take().expect("start() is called once");
        let mut outcome = Outcome::default();
        let mut link = Link::open(ctx, options, spec, &mut outcome);
        let op = BlockOp::Read { offset: 0, len: self.work.options.block_bytes };
        link.submit(ctx, BlockRequest { id: FIRST, op }, &mut outcome);
        self.link = Some(link);
        self.follow(ctx, outcome);
    }

    fn command(&mut self, ctx: &mut Context, Update { spec, answer }: Update) {
        let mut outcome = Outcome::default();
        let link = self.link.as_mut().expect("start() is the first call");
        let result = link.configure(ctx, *spec, &mut outcome);
        self.follow(ctx, outcome);
        link::answer(&answer, result);
    }

    fn opened(&mut self, ctx: &mut Context, conn: ConnId, _how: Opened) {
        // It may have been given up in the very iteration in which it came about.
        let Some(path) = self.roles.get(&conn).copied() else { return };
        self.step(ctx, |link, ctx, out| link.opened(ctx, path, out));
    }

    fn frame(&mut self, ctx: &mut Context, conn: ConnId, frame: Frame) {
        let path = *self.roles.get(&conn).expect("a connection has a role until it has ended");
        self.step(ctx, |link, ctx, out| link.frame(ctx, path, frame, out));
    }

    fn closed(&mut self, ctx: &mut Context, conn: ConnId, _reason: CloseReason) {
        let path = self.roles.remove(&conn).expect("a connection ends once");
        self.step(ctx, |link, ctx, out| link.closed(ctx, path, out));
    }

    fn timer(&mut self, ctx: &mut Context) {
        self.step(ctx, |link, ctx, out| link.tick(ctx, out));
    }

    fn idle(&mut self, ctx: &mut Context) {
        ctx.set_timer(self.link.as_ref().and_then(|link| link.session().wake_at()));
    }

    fn disk(&mut self, _ctx: &mut Context, _disk: DiskIndex, _done: &mut Vec<DiskDone>) {}

    fn accepted(&mut self, _ctx: &mut Context, _listener: ListenerId, _socket: OwnedFd) {}
}
