//! Where the time of one training step goes: what the host did, and how long it then waited for the device.
//!
//! A step is measured from an idle device to an idle device. The host's parts are the time until the work was handed
//! over, not until it was done: on a GPU they run beside the device's work, and what is left of that when the host is
//! through is the wait. A wait near 0 means that the device follows at the host's heels and launching decides the
//! speed; a long wait means that the device decides. On the CPU the host is the device: everything is in the parts.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// What the host does in a step, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostWork {
    /// Which pictures, captions and noise levels; noise.
    Draw,
    /// Leaves of all parameters, and the models around them.
    Build,
    /// The models and the loss; letting go of the models.
    Forward,
    /// Gradients.
    Backward,
    /// Clipping, AdamW, average; letting go of leaves and gradients.
    Update,
}

/// Fields of the log, by [`HostWork`].
const FIELDS: [&str; 5] = [
    "host_draw_s",
    "host_build_s",
    "host_forward_s",
    "host_backward_s",
    "host_update_s",
];

/// Runs through one step.
#[derive(Clone, Debug)]
pub(crate) struct StepClock {
    last: Instant,
    parts: [Duration; FIELDS.len()],
}

impl StepClock {
    pub(crate) fn start() -> Self {
        Self {
            last: Instant::now(),
            parts: Default::default(),
        }
    }

    /// What was done since the last call was this.
    pub(crate) fn did(&mut self, part: HostWork) {
        let now = Instant::now();
        self.parts[part as usize] += now - self.last;
        self.last = now;
    }

    /// The device has ended what was asked of it.
    pub(crate) fn device_is_idle(self) -> StepTime {
        StepTime {
            wait: self.last.elapsed(),
            parts: self.parts,
        }
    }
}

/// One step's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StepTime {
    parts: [Duration; FIELDS.len()],
    wait: Duration,
}

impl StepTime {
    /// Seconds of each part, their sum, the wait, and the sum's share of both.
    pub(crate) fn put_into(&self, line: &mut Value) {
        let host_s: f64 = self.parts.iter().map(Duration::as_secs_f64).sum();
        let wait_s = self.wait.as_secs_f64();
        for (field, part) in FIELDS.into_iter().zip(self.parts) {
            line[field] = json!(part.as_secs_f64());
        }
        line["host_s"] = json!(host_s);
        line["wait_s"] = json!(wait_s);
        line["host_share"] = json!(host_s / (host_s + wait_s).max(f64::MIN_POSITIVE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_and_the_wait_make_up_the_step() {
        let mut parts = [Duration::ZERO; FIELDS.len()];
        parts[HostWork::Draw as usize] = Duration::from_millis(250);
        parts[HostWork::Update as usize] = Duration::from_millis(500);
        let time = StepTime {
            parts,
            wait: Duration::from_millis(250),
        };
        let mut line = json!({});
        time.put_into(&mut line);
        let expected = json!({
            "host_draw_s": 0.25, "host_build_s": 0.0, "host_forward_s": 0.0, "host_backward_s": 0.0,
            "host_update_s": 0.5, "host_s": 0.75, "wait_s": 0.25, "host_share": 0.75,
        });
        assert_eq!(line, expected);
    }

    #[test]
    fn time_goes_to_the_part_that_ended_it() {
        let mut clock = StepClock::start();
        std::thread::sleep(Duration::from_millis(3));
        clock.did(HostWork::Build);
        let time = clock.device_is_idle();
        assert!(time.parts[HostWork::Build as usize] >= Duration::from_millis(3));
        assert_eq!(time.parts[HostWork::Draw as usize], Duration::ZERO);
    }
}
