//! `sdsctl events`.

use std::fmt::Write as _;
use std::thread;
use std::time::Duration;

use clap::Args;

use super::Failure;
use super::output::{Format, Output, printable, utc};
use crate::admin::client::{Client, ClientError};
use crate::admin::events::{Event, EventLevel};
use crate::env::wall_clock;
use crate::units::TimeSpan;

/// Pause between two questions of `--follow`.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);
/// How far behind the newest event another node's may come in.
const BEHIND_MS: u64 = 5_000;

/// Arguments of `events`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sdsctl events --since 1h --level warning\n  sdsctl events --follow\n\nEach node \
                        keeps its newest 2000 events until it stops; its log has the others."
)]
pub(super) struct EventArgs {
    /// Only events of the last TIME, such as 10m or 2h
    #[arg(long, value_name = "TIME")]
    since: Option<TimeSpan>,
    /// Only events that matter as much: info, warning or error
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = level)]
    level: EventLevel,
    /// How many, the newest: 1 to 2000
    #[arg(long, value_name = "COUNT", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=2_000))]
    limit: u32,
    /// Goes on with what happens from now on, until interrupted; json: an object a line
    #[arg(long)]
    follow: bool,
}

fn level(text: &str) -> Result<EventLevel, String> {
    match text {
        "info" => Ok(EventLevel::Info),
        "warning" => Ok(EventLevel::Warning),
        "error" => Ok(EventLevel::Error),
        _ => Err("expected info, warning or error".to_owned()),
    }
}

/// Shows what happened.
pub(super) fn run(args: &EventArgs, client: &Client, out: &mut Output) -> Result<(), Failure> {
    let since = match args.since {
        None => 0,
        Some(span) => {
            let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            millis(wall_clock()).saturating_sub(millis(span.0))
        }
    };
    let mut events = client.events(since, args.level, args.limit)?;
    if !args.follow {
        out.show(&events, |events| table(events))?;
        return Ok(());
    }
    let mut shown: Vec<Event> = Vec::new();
    loop {
        let fresh: Vec<&Event> = events.iter().filter(|event| !shown.contains(event)).collect();
        let text = match out.format() {
            Format::Table => fresh.iter().map(|event| line(event)).collect(),
            Format::Json => {
                let lines = fresh.into_iter().map(serde_json::to_string);
                lines.map(|line| Ok(line? + "\n")).collect::<std::io::Result<String>>()?
            }
        };
        out.text(&text)?;
        let newest = events.iter().map(|event| event.at_unix_ms).max();
        let from = newest.map_or(since, |newest| newest.saturating_sub(BEHIND_MS));
        shown = events.into_iter().filter(|event| event.at_unix_ms >= from).collect();
        events = loop {
            thread::sleep(FOLLOW_EVERY);
            match client.events(from, args.level, 2_000) {
                Ok(events) => break events,
                // A node that restarts is what one watches for.
                Err(error @ ClientError::Connect { .. }) => {
                    Failure::from(error).report(out.format())?;
                }
                Err(error) => return Err(error.into()),
            }
        };
    }
}

fn table(events: &[Event]) -> String {
    if events.is_empty() {
        "nothing happened\n".to_owned()
    } else {
        events.iter().map(line).collect()
    }
}

fn line(event: &Event) -> String {
    let mut text = format!("{}  {:<7}  ", utc(event.at_unix_ms), event.level);
    if !event.node.is_empty() {
        write!(text, "{}: ", event.node).expect("a string takes all");
    }
    text += &event.message;
    for (name, value) in &event.fields {
        write!(text, "  {name}={value}").expect("a string takes all");
    }
    printable(&text) + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let event = Event {
            at_unix_ms: 1_700_000_000_123,
            node: "n1".into(),
            level: EventLevel::Warning,
            part: "disk".into(),
            message: "the disk\nburns".into(),
            fields: [("disk".to_owned(), "d1".to_owned())].into(),
        };
        let text = table(&[event]);
        assert_eq!(text, "2023-11-14 22:13:20.123  warning  n1: the disk?burns  disk=d1\n");
        assert_eq!(table(&[]), "nothing happened\n");
    }
}
