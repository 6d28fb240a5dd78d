//! Tables against published values, settings against what they may be.

use super::*;

fn close(found: f32, expected: f64) {
    assert!(
        (f64::from(found) - expected).abs() < 1e-6,
        "{found} instead of {expected}"
    );
}

fn parse(text: &str) -> Result<SchedulerConfig, SchedulerError> {
    SchedulerConfig::from_json(Path::new("scheduler_config.json"), text)
}

#[test]
fn dynamic_shifting_leaves_the_training_table_unshifted() {
    let scheduler = Scheduler::new(SchedulerConfig::flux_dev());
    assert_eq!(scheduler.train_sigmas().len(), 1000);
    for (u, index, sigma) in [
        (0.0, 0, 1.0),
        (0.001, 1, 0.999),
        (0.1, 100, 0.9),
        (0.5, 500, 0.5),
        (0.999, 999, 0.001),
    ] {
        let point = scheduler.training_point(u, Weighting::None);
        assert_eq!(point.index, index);
        close(point.sigma, sigma);
        close(point.timestep / 1000.0, sigma);
    }
}

#[test]
fn a_static_shift_moves_the_training_table_too() {
    let config = SchedulerConfig {
        num_train_timesteps: 1000,
        time_shift: TimeShift::Static { shift: 3.0 },
    };
    close(Scheduler::new(config).train_sigmas()[500], 0.75);
    close(Scheduler::new(config).inference(2, 9).sigmas[1], 0.75);
}

#[test]
fn a_draw_outside_the_table_is_brought_to_its_ends() {
    let scheduler = Scheduler::new(SchedulerConfig::flux_dev());
    assert_eq!(scheduler.index(1.0), 999);
    assert_eq!(scheduler.index(-0.3), 0);
    assert_eq!(scheduler.index(f32::NAN), 0);
}

#[test]
fn sampling_levels_are_those_of_the_published_tables() {
    let scheduler = Scheduler::new(SchedulerConfig::flux_dev());
    let schedule = scheduler.inference(50, 1024);
    assert_eq!((schedule.sigmas.len(), schedule.timesteps.len()), (51, 50));
    let first = [
        1.0,
        0.989_247_649_241_805_4,
        0.978_290_438_885_261_2,
        0.967_122_457_977_338_2,
    ];
    for (found, expected) in schedule.sigmas.iter().zip(first) {
        close(*found, expected);
    }
    close(schedule.sigmas[49], 0.036_904_456_751_936_8);
    assert_eq!(schedule.sigmas[50], 0.0);
    close(
        scheduler.inference(28, 4096).sigmas[14],
        0.759_510_916_949_111_1,
    );
    assert_eq!(scheduler.inference(1, 256).sigmas, [1.0, 0.0]);
}

#[test]
fn schnells_levels_are_evenly_spaced() {
    let schedule = Scheduler::new(SchedulerConfig::flux_schnell()).inference(4, 4096);
    assert_eq!(schedule.sigmas, [1.0, 0.75, 0.5, 0.25, 0.0]);
    assert_eq!(schedule.timesteps, [1000.0, 750.0, 500.0, 250.0]);
}

#[test]
fn mu_is_a_half_at_256_tokens_and_the_line_goes_on() {
    let shift = SchedulerConfig::flux_dev().time_shift;
    for (seq_len, mu) in [
        (256, 0.5),
        (1024, 0.63),
        (4096, 1.15),
        (60, 0.466_822_916_666_666_64),
    ] {
        assert!((shift.mu(seq_len) - mu).abs() < 1e-12);
    }
}

#[test]
fn the_linear_shift_uses_mu_itself() {
    let text = r#"{"use_dynamic_shifting": true, "time_shift_type": "linear"}"#;
    let schedule = Scheduler::new(parse(text).expect("valid")).inference(2, 256);
    close(schedule.sigmas[1], 0.5 / (0.5 + 1.0));
}

#[test]
fn a_published_file_is_understood_and_missing_fields_have_upstreams_values() {
    let text = r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.42.1", "invert_sigmas": false,
        "shift_terminal": null, "shift": 3.0, "use_dynamic_shifting": true, "use_karras_sigmas": false}"#;
    assert_eq!(parse(text).expect("valid"), SchedulerConfig::flux_dev());
    assert_eq!(parse("{}").expect("valid"), SchedulerConfig::flux_schnell());
}

#[test]
fn settings_that_are_not_implemented_are_refused_by_name() {
    for (text, key) in [
        (r#"{"use_karras_sigmas": true}"#, "use_karras_sigmas"),
        (r#"{"shift_terminal": 0.02}"#, "shift_terminal"),
        (r#"{"stochastic_sampling": true}"#, "stochastic_sampling"),
        (r#"{"invert_sigmas": true}"#, "invert_sigmas"),
        (
            r#"{"use_dynamic_shifting": true, "time_shift_type": "cubic"}"#,
            "time_shift_type",
        ),
        (r#"{"shift": 0}"#, "shift"),
        (r#"{"num_train_timesteps": 0}"#, "num_train_timesteps"),
        (
            r#"{"use_dynamic_shifting": true, "max_image_seq_len": 256}"#,
            "max_image_seq_len",
        ),
    ] {
        let error = parse(text).expect_err(text).to_string();
        assert!(error.contains(&format!("`{key}`")), "{error}");
    }
    let error = parse(r#"{"_class_name": "DDIMScheduler"}"#).expect_err("another class");
    assert!(error.to_string().contains("`DDIMScheduler`"), "{error}");
    assert!(matches!(parse("[]"), Err(SchedulerError::Syntax { .. })));
    let absent = SchedulerConfig::from_file(Path::new("/nowhere/scheduler_config.json"));
    assert!(matches!(absent, Err(SchedulerError::Read { .. })));
}
