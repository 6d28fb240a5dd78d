//! Progress of long jobs: a bar on a terminal, a plain line every ten seconds elsewhere, nothing for a short job.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A job shorter than this shows nothing: it would only flicker.
const SHOW_AFTER: Duration = Duration::from_secs(1);
/// Time between two plain lines of one job, so that a log of an hour's training stays readable.
const PLAIN_LINE_EVERY: Duration = Duration::from_secs(10);

/// All bars of the process, so that log lines can be printed above them.
static BARS: LazyLock<MultiProgress> =
    LazyLock::new(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10)));

/// Runs `print` while no bar is on the screen, so that its lines are not torn.
pub(crate) fn above_the_bars<R>(print: impl FnOnce() -> R) -> R {
    BARS.suspend(print)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Bars,
    PlainLines,
    Silent,
}

/// Where jobs report how far they are. Cheap to clone; jobs of clones share the terminal.
#[derive(Clone, Debug)]
pub struct Progress {
    style: Style,
}

impl Progress {
    /// Bars when stderr is a terminal, plain lines when it is not.
    pub fn stderr() -> Self {
        let style = if std::io::stderr().is_terminal() {
            Style::Bars
        } else {
            Style::PlainLines
        };
        Self { style }
    }

    /// Shows nothing; for tests and for callers that only want an answer.
    pub fn silent() -> Self {
        Self {
            style: Style::Silent,
        }
    }

    /// Starts a job of `total` units, e.g. `job("encode captions", 60, "captions")`.
    ///
    /// `total` may be 0 when it is not known: then only count and rate are shown.
    pub fn job(&self, what: &str, total: u64, unit: &'static str) -> Job {
        Job {
            style: self.style,
            what: what.to_owned(),
            unit,
            total,
            done: AtomicU64::new(0),
            already_done: AtomicU64::new(0),
            started: Instant::now(),
            shown: Mutex::new(Shown {
                bar: None,
                last_line: None,
                message: String::new(),
            }),
        }
    }
}

/// One job under way. It can be advanced from many threads; dropping it ends its display.
#[derive(Debug)]
pub struct Job {
    style: Style,
    what: String,
    unit: &'static str,
    total: u64,
    done: AtomicU64,
    already_done: AtomicU64,
    started: Instant,
    shown: Mutex<Shown>,
}

#[derive(Debug)]
struct Shown {
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    message: String,
}

impl Job {
    /// Says that `units` were done before this job started (a resumed training run): they count as done, not as speed.
    pub fn already_done(&self, units: u64) {
        self.already_done.fetch_add(units, Ordering::Relaxed);
        self.advance(units);
    }

    /// Says that `units` more are done.
    pub fn advance(&self, units: u64) {
        let done = self.done.fetch_add(units, Ordering::Relaxed) + units;
        self.show(done);
    }

    /// Sets the words behind the numbers, e.g. `loss 0.123`.
    pub fn message(&self, message: impl Into<String>) {
        if self.style == Style::Silent {
            return;
        }
        let message = message.into();
        let mut shown = self
            .shown
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(bar) = &shown.bar {
            bar.set_message(message.clone());
        }
        shown.message = message;
    }

    /// Ends the display; a plain-lines job that had been shown prints how long it took.
    pub fn finish(self) {
        drop(self);
    }

    fn show(&self, done: u64) {
        let elapsed = self.started.elapsed();
        if self.style == Style::Silent || elapsed < SHOW_AFTER {
            return;
        }
        let mut shown = self
            .shown
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        match self.style {
            Style::Bars => {
                let message = shown.message.clone();
                let bar = shown.bar.get_or_insert_with(|| self.new_bar(&message));
                bar.set_position(done);
            }
            Style::PlainLines => {
                let due = shown
                    .last_line
                    .is_none_or(|last| last.elapsed() >= PLAIN_LINE_EVERY);
                if due {
                    shown.last_line = Some(Instant::now());
                    let line = self.plain_line(done, elapsed, &shown.message);
                    // A closed stderr must not end the work.
                    let _ = writeln!(std::io::stderr(), "{line}");
                }
            }
            Style::Silent => {}
        }
    }

    fn new_bar(&self, message: &str) -> ProgressBar {
        let bar = if self.total == 0 {
            ProgressBar::no_length()
        } else {
            ProgressBar::new(self.total)
        };
        let template = if self.total == 0 {
            "{prefix} {pos} {per_sec} {msg}"
        } else {
            "{prefix} [{bar:30}] {pos}/{len} {per_sec}, {eta} left {msg}"
        };
        let style = ProgressStyle::with_template(template)
            .expect("the templates above are valid")
            .progress_chars("=> ");
        let already_done = self.already_done.load(Ordering::Relaxed);
        let bar = BARS.add(
            bar.with_style(style)
                .with_prefix(self.what.clone())
                .with_message(message.to_owned())
                .with_position(already_done)
                .with_elapsed(self.started.elapsed()),
        );
        bar.reset_eta();
        bar
    }

    fn plain_line(&self, done: u64, elapsed: Duration, message: &str) -> String {
        let fresh = done.saturating_sub(self.already_done.load(Ordering::Relaxed));
        let rate = fresh as f64 / elapsed.as_secs_f64();
        let unit = self.unit;
        let mut line = if self.total == 0 {
            format!("{}: {done} {unit}, {rate:.2} {unit}/s", self.what)
        } else {
            format!(
                "{}: {done}/{} {unit}, {rate:.2} {unit}/s",
                self.what, self.total
            )
        };
        if self.total > done && rate > 0.0 {
            let left = (self.total - done) as f64 / rate;
            line.push_str(&format!(", {} left", human_seconds(left)));
        }
        if !message.is_empty() {
            line.push_str(", ");
            line.push_str(message);
        }
        line
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let done = self.done.load(Ordering::Relaxed);
        let shown = self
            .shown
            .get_mut()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(bar) = shown.bar.take() {
            bar.finish_and_clear();
        }
        if shown.last_line.is_some() {
            let _ = writeln!(
                std::io::stderr(),
                "{}: {done} {} in {}",
                self.what,
                self.unit,
                human_seconds(self.started.elapsed().as_secs_f64())
            );
        }
    }
}

/// Seconds in the words of a person: `4.2 s`, `3 min 20 s`, `2 h 05 min`.
pub fn human_seconds(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3600, whole % 3600 / 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_said_in_the_largest_two_units() {
        assert_eq!(human_seconds(4.24), "4.2 s");
        assert_eq!(human_seconds(200.0), "3 min 20 s");
        assert_eq!(human_seconds(7500.0), "2 h 05 min");
    }

    #[test]
    fn a_plain_line_names_job_count_rate_and_time_left() {
        let job = Progress::silent().job("train", 100, "steps");
        let line = job.plain_line(25, Duration::from_secs(50), "loss 0.5");
        assert_eq!(
            line,
            "train: 25/100 steps, 0.50 steps/s, 2 min 30 s left, loss 0.5"
        );
    }

    #[test]
    fn work_done_before_a_resume_is_no_speed() {
        let job = Progress::silent().job("train", 100, "steps");
        job.already_done(50);
        let line = job.plain_line(60, Duration::from_secs(10), "");
        assert_eq!(line, "train: 60/100 steps, 1.00 steps/s, 40.0 s left");
    }

    #[test]
    fn a_short_job_shows_nothing() {
        let job = Progress {
            style: Style::PlainLines,
        }
        .job("short", 2, "files");
        job.advance(2);
        assert!(job.shown.lock().expect("not poisoned").last_line.is_none());
    }
}
