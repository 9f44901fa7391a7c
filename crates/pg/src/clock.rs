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

/// A number of this boot of the host: another one has another (`/proc/sys/kernel/random/boot_id`).
pub fn boot_number() -> u64 {
    let digits: String = boot().chars().filter(char::is_ascii_hexdigit).take(16).collect();
    u64::from_str_radix(&digits, 16).unwrap_or(0)
}

/// A number of this boot of the host and of its network, as a process sees it: a container may have one of its own.
pub fn network_number() -> u64 {
    let network = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
    let digits: String =
        network.to_string_lossy().chars().filter(char::is_ascii_digit).take(15).collect();
    boot_number() ^ digits.parse::<u64>().unwrap_or(0)
}

/// The name of this boot of the host.
pub fn boot() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}
