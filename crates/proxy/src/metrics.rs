//! What is counted, in Prometheus' text format (version 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use model::barrier::Reason;

/// Upper bounds of the pause histogram, in seconds.
const PAUSE_BOUNDS: [f64; 12] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 2.5, 5.0];

#[derive(Debug, Default)]
pub struct Metrics {
    pub logins: AtomicU64,
    pub logins_failed: AtomicU64,
    pub cancels: AtomicU64,
    moves: Mutex<BTreeMap<(String, String), u64>>,
    pauses: Mutex<Pauses>,
}

#[derive(Debug, Default)]
struct Pauses {
    buckets: [u64; PAUSE_BOUNDS.len()],
    count: u64,
    sum: f64,
}

impl Metrics {
    pub fn count_move(&self, result: &str, reasons: &[Reason]) {
        let mut moves = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        let mut add = |reason: &str| *moves.entry((result.into(), reason.into())).or_default() += 1;
        if reasons.is_empty() {
            add("");
        }
        for reason in reasons {
            match reason {
                Reason::Pinned(pin) => add(pin.code()),
                Reason::Busy { .. } => add("busy"),
                Reason::Failed { .. } => add("error"),
                Reason::ServerLost { .. } => add("server_lost"),
            }
        }
    }

    pub fn count_pause(&self, pause: Duration) {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = pause.as_secs_f64();
        for (bucket, bound) in pauses.buckets.iter_mut().zip(PAUSE_BOUNDS) {
            if seconds <= bound {
                *bucket += 1;
            }
        }
        pauses.count += 1;
        pauses.sum += seconds;
    }

    /// Appends everything that is counted here.
    pub fn write(&self, out: &mut String) {
        let plain = [
            ("holdfast_logins_total", "Clients that logged in.", &self.logins),
            ("holdfast_logins_failed_total", "Logins that a server refused.", &self.logins_failed),
            ("holdfast_cancels_total", "Cancel requests that were forwarded.", &self.cancels),
        ];
        for (name, help, value) in plain {
            write_metric(
                out,
                name,
                "counter",
                help,
                &[(String::new(), value.load(Ordering::Relaxed))],
            );
        }
        let moves = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        let lines: Vec<(String, u64)> = moves
            .iter()
            .map(|((result, reason), n)| {
                (format!("{{result=\"{result}\",reason=\"{reason}\"}}"), *n)
            })
            .collect();
        write_metric(
            out,
            "holdfast_moves_total",
            "counter",
            "Sessions by what became of their move.",
            &lines,
        );
        let pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        let name = "holdfast_pause_seconds";
        // Writing to a String does not fail.
        let _ =
            writeln!(out, "# HELP {name} How long sessions were held.\n# TYPE {name} histogram");
        for (bound, bucket) in PAUSE_BOUNDS.iter().zip(pauses.buckets) {
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {bucket}");
        }
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {}", pauses.count);
        let _ = writeln!(out, "{name}_sum {}\n{name}_count {}", pauses.sum, pauses.count);
    }
}

/// Appends one metric with its lines of labels and values.
pub fn write_metric(out: &mut String, name: &str, kind: &str, help: &str, lines: &[(String, u64)]) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in lines {
        let _ = writeln!(out, "{name}{labels} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_counted_in_every_bucket_that_holds_them() {
        let metrics = Metrics::default();
        metrics.count_pause(Duration::from_millis(120));
        metrics.count_pause(Duration::from_millis(7));
        metrics.count_move("moved", &[]);
        let mut out = String::new();
        metrics.write(&mut out);
        assert!(out.contains("holdfast_pause_seconds_bucket{le=\"0.1\"} 1\n"), "{out}");
        assert!(out.contains("holdfast_pause_seconds_bucket{le=\"0.15\"} 2\n"), "{out}");
        assert!(out.contains("holdfast_pause_seconds_count 2\n"), "{out}");
        assert!(out.contains("holdfast_moves_total{result=\"moved\",reason=\"\"} 1\n"), "{out}");
    }
}
