//! `sdsctl scrub …`.

use clap::Subcommand;

use super::output::{Output, Table, human_bytes, human_seconds, percent};
use super::{Failure, parse};
use crate::admin::client::Client;
use crate::admin::types::{Scrub, ScrubState, StartScrub, VolumeName};

/// Verbs on scrubs.
#[derive(Debug, Subcommand)]
pub(super) enum ScrubVerb {
    /// Begins to read and check all that a volume has stored, or all volumes; bad blocks are repaired
    #[command(after_help = "Example:\n  sdsctl scrub start --volume default/vm1")]
    Start {
        /// Only this volume
        #[arg(long, value_name = "POOL/NAME", value_parser = parse::volume_name)]
        volume: Option<VolumeName>,
    },
    /// Shows how far the scrubs are, and what they found
    Status,
}

/// Runs the verb.
pub(super) fn run(verb: &ScrubVerb, client: &Client, out: &mut Output) -> Result<(), Failure> {
    let scrubs = match verb {
        ScrubVerb::Start { volume } => {
            let volume = volume.as_ref().map(ToString::to_string);
            client.start_scrub(&StartScrub { volume })?
        }
        ScrubVerb::Status => client.scrubs()?,
    };
    out.show(&scrubs, |scrubs| table(scrubs))?;
    Ok(())
}

fn table(scrubs: &[Scrub]) -> String {
    let mut table = Table::new(&[
        "VOLUME",
        "STATE",
        ">DONE",
        ">OF",
        ">%",
        ">LEFT",
        "FINISHED",
        ">FOUND",
        ">REPAIRED",
        ">UNREPAIRABLE",
        ">UNCHECKED",
    ]);
    for scrub in scrubs {
        let running = scrub.state == ScrubState::Running;
        let of_round = |text: String| if running { text } else { "-".to_owned() };
        table.row(vec![
            scrub.volume.clone(),
            scrub.state.to_string(),
            of_round(human_bytes(scrub.bytes_done)),
            of_round(human_bytes(scrub.bytes_total)),
            of_round(percent(scrub.bytes_done, scrub.bytes_total)),
            of_round(scrub.eta_s.map_or("-".to_owned(), human_seconds)),
            scrub.finished_at.map_or("never".to_owned(), utc),
            scrub.found.to_string(),
            scrub.repaired.to_string(),
            scrub.unrepairable.to_string(),
            human_bytes(scrub.bytes_unchecked),
        ]);
    }
    table.render()
}

/// Seconds since 1970 as `2026-01-31T12:00:00Z`.
fn utc(seconds: u64) -> String {
    // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms": days to a civil date.
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_700_000_000, "2023-11-14T22:13:20Z"),
            (4_102_444_799, "2099-12-31T23:59:59Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}
