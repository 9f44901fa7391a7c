//! The host's time, sleep included.

use std::time::Duration;

use model::lease::Moment;

/// Now, by a clock that nobody sets and that goes on while the host sleeps (`clock_gettime(2)`, `CLOCK_BOOTTIME`).
pub fn now() -> Moment {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
    Moment(Duration::new(seconds, nanoseconds))
}
