//! Prints one line per check and a table of sections at the end, and remembers whether all held.

/// What was checked, by section.
#[derive(Debug, Default)]
pub struct Report {
    sections: Vec<Section>,
}

/// Checks that belong together.
#[derive(Debug, Default)]
struct Section {
    name: String,
    checks: usize,
    failures: usize,
    /// The largest error as a part of what is allowed, where anything is, and its check.
    nearest: (f64, String),
}

impl Report {
    /// Begins a section and runs it; see [`Report::guarded`].
    pub fn section(&mut self, name: &str, run: impl FnOnce(&mut Self)) {
        self.sections.push(Section {
            name: name.to_owned(),
            ..Section::default()
        });
        self.guarded(name, run);
    }

    /// Notes that `error` was found where at most `tolerance` is allowed. A NaN fails.
    pub fn check(&mut self, name: &str, error: f64, tolerance: f64) {
        let holds = error <= tolerance;
        let verdict = if holds { "ok  " } else { "FAIL" };
        println!("{verdict} {name}: {error:.3e}, at most {tolerance:.1e}");
        let section = self.sections.last_mut().expect("checks are of a section");
        section.checks += 1;
        section.failures += usize::from(!holds);
        let part = error / tolerance;
        if part > section.nearest.0 {
            section.nearest = (part, name.to_owned());
        }
    }

    /// Runs a group of checks; if it breaks off, that is one failure, and what comes after still runs.
    pub fn guarded(&mut self, name: &str, run: impl FnOnce(&mut Self)) {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(self)));
        if outcome.is_err() {
            self.check(&format!("{name}: broke off"), f64::NAN, 0.0);
        }
    }

    /// Prints the sum of it as a table in Markdown and says whether all held.
    pub fn holds(&self) -> bool {
        println!("\n| section | checks | failures | nearest to its bound | that check |");
        println!("|---|---|---|---|---|");
        for section in &self.sections {
            let Section {
                name,
                checks,
                failures,
                nearest: (part, check),
            } = section;
            println!(
                "| {name} | {checks} | {failures} | {:.0} % | {check} |",
                100.0 * part
            );
        }
        let sum = |of: fn(&Section) -> usize| self.sections.iter().map(of).sum::<usize>();
        let failures = sum(|section| section.failures);
        println!(
            "\n{} checks, {failures} failures",
            sum(|section| section.checks)
        );
        failures == 0
    }
}
