//! The time of day as text, for manifests and log file names. Never part of a fingerprint.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Now, as `2026-01-31T12:30:05Z`.
pub fn utc_timestamp() -> String {
    let [year, month, day, hour, minute, second] = civil(since_epoch().as_secs());
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Now, to the millisecond and without characters that file systems refuse: `2026-01-31T12-30-05.123Z`.
pub fn file_timestamp() -> String {
    let now = since_epoch();
    let [year, month, day, hour, minute, second] = civil(now.as_secs());
    let millisecond = now.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}-{minute:02}-{second:02}.{millisecond:03}Z")
}

/// Time since 1970; a clock set before that counts as 1970.
pub(crate) fn since_epoch() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// Seconds since 1970 as year, month, day, hour, minute, second in the Gregorian calendar, UTC.
///
/// Years are counted from March, so that the leap day is a year's last: 146,097 days make 400 years.
fn civil(unix_s: u64) -> [u64; 6] {
    let days_since_march_0000 = unix_s / 86_400 + 719_468;
    let era = days_since_march_0000 / 146_097;
    let day_of_era = days_since_march_0000 % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let second_of_day = unix_s % 86_400;
    [
        year,
        month,
        day,
        second_of_day / 3_600,
        second_of_day / 60 % 60,
        second_of_day % 60,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_have_their_calendar_date() {
        assert_eq!(civil(0), [1970, 1, 1, 0, 0, 0]);
        assert_eq!(civil(951_782_400), [2000, 2, 29, 0, 0, 0]);
        assert_eq!(civil(1_000_000_000), [2001, 9, 9, 1, 46, 40]);
        assert_eq!(civil(4_107_542_399), [2100, 2, 28, 23, 59, 59]);
        assert_eq!(civil(4_107_542_400), [2100, 3, 1, 0, 0, 0]);
    }
}
