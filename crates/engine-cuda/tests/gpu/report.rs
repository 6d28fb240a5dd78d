//! Prints one line per check and remembers whether all held.

/// What was checked.
#[derive(Debug, Default)]
pub struct Report {
    checks: usize,
    failures: usize,
}

impl Report {
    /// Notes that `error` was found where at most `tolerance` is allowed. A NaN fails.
    pub fn check(&mut self, name: &str, error: f64, tolerance: f64) {
        let holds = error <= tolerance;
        self.checks += 1;
        self.failures += usize::from(!holds);
        let verdict = if holds { "ok  " } else { "FAIL" };
        println!("{verdict} {name}: {error:.3e}, at most {tolerance:.1e}");
    }

    /// Runs a group of checks; if it breaks off, that is one failure, and what comes after still runs.
    pub fn guarded(&mut self, name: &str, run: impl FnOnce(&mut Self)) {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(self)));
        if outcome.is_err() {
            self.check(&format!("{name}: broke off"), f64::NAN, 0.0);
        }
    }

    /// Prints the sum of it and says whether all held.
    pub fn holds(&self) -> bool {
        println!("{} checks, {} failures", self.checks, self.failures);
        self.failures == 0
    }
}
