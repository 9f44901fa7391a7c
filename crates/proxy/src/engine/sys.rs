//! The few system calls that the standard library does not have.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub(super) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: eventfd takes no pointers; the descriptor it returns is ours alone.
    unsafe {
        Ok(OwnedFd::from_raw_fd(check(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))?))
    }
}

pub(super) fn notify(fd: RawFd) {
    let one: u64 = 1;
    // SAFETY: eight bytes of a live local are read. A full counter is a pending wake-up already.
    unsafe { libc::write(fd, (&raw const one).cast(), 8) };
}

pub(super) fn drain(fd: RawFd) {
    let mut count: u64 = 0;
    // SAFETY: eight bytes of a live local are written.
    unsafe { libc::read(fd, (&raw mut count).cast(), 8) };
}

/// Raises the limit of open descriptors as far as allowed, and gives it. Each session needs two.
pub(super) fn raise_descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit into a live local, and reads another from there.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) != 0 {
            return 0;
        }
        let wanted = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
        let raised = libc::setrlimit(libc::RLIMIT_NOFILE, &raw const wanted) == 0;
        if raised { limit.rlim_max } else { limit.rlim_cur }
    }
}

/// An epoll instance. Registrations are edge-triggered and made once a socket.
#[derive(Debug)]
pub(super) struct Epoll(OwnedFd);

/// What happened to a registered socket.
#[derive(Debug, Clone, Copy)]
pub(super) struct Event {
    pub(super) token: u64,
    pub(super) readable: bool,
    /// The peer has closed, or the socket failed: reading must go on until it says so.
    pub(super) closing: bool,
}

pub(super) const EVENTS_MAX: usize = 256;

impl Epoll {
    pub(super) fn new() -> io::Result<Epoll> {
        // SAFETY: epoll_create1 takes no pointers; the descriptor it returns is ours alone.
        unsafe { Ok(Epoll(OwnedFd::from_raw_fd(check(libc::epoll_create1(libc::EPOLL_CLOEXEC))?))) }
    }

    pub(super) fn add(&self, fd: RawFd, token: u64) -> io::Result<()> {
        let flags = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET;
        let mut event = libc::epoll_event { events: flags.cast_unsigned(), u64: token };
        // SAFETY: the event is a live local; the kernel copies it.
        check(unsafe {
            libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event)
        })
        .map(drop)
    }

    pub(super) fn remove(&self, fd: RawFd) {
        // SAFETY: no event is passed for DEL. A socket that is not registered is not an error that matters.
        unsafe {
            libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut())
        };
    }

    /// Waits at most `timeout_ms` and appends what happened to `events`.
    pub(super) fn wait(&self, timeout_ms: i32, events: &mut Vec<Event>) -> io::Result<()> {
        let mut raw = [libc::epoll_event { events: 0, u64: 0 }; EVENTS_MAX];
        // SAFETY: the kernel writes at most EVENTS_MAX events into a live local array of that length.
        let count = unsafe {
            libc::epoll_wait(
                self.0.as_raw_fd(),
                raw.as_mut_ptr(),
                i32::try_from(EVENTS_MAX).unwrap_or(1),
                timeout_ms,
            )
        };
        let count = match check(count) {
            Ok(count) => usize::try_from(count).unwrap_or(0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in raw.iter().take(count) {
            let flags = event.events.cast_signed();
            let closing = flags & (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) != 0;
            events.push(Event {
                token: event.u64,
                readable: flags & libc::EPOLLIN != 0 || closing,
                closing,
            });
        }
        Ok(())
    }
}

/// Reads at most as much as fits into `buffer`, without waiting.
pub(super) fn receive(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes into `buffer`.
    let len =
        unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// Sends what the socket takes, without waiting and without a signal.
pub(super) fn send(fd: RawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the kernel reads at most `bytes.len()` bytes of `bytes`.
    let len = unsafe {
        libc::send(fd, bytes.as_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}
