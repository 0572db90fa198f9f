//! The newest events of this process: what its log says at level `info` and above, kept in memory for
//! `sdsctl events`.
//!
//! Each state change is one line of the log already, so nothing is declared twice. What is kept is bounded in
//! number and in length; a line that is written a thousand times pushes others out, as in any log.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::{Debug, Write as _};
use std::sync::{Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Event as Logged, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use crate::admin::events::{Event, EventLevel};
use crate::env::wall_clock;

/// Events that are kept.
const EVENTS_MAX: usize = 2_000;
/// Longest text of an event, and of a value of a field, bytes.
const TEXT_BYTES_MAX: usize = 512;
/// Most fields of an event.
const FIELDS_MAX: usize = 16;

static RECENT: Recent = Recent { events: Mutex::new(VecDeque::new()) };

/// Events in the order in which they happened.
struct Recent {
    events: Mutex<VecDeque<Event>>,
}

impl Recent {
    fn push(&self, event: Event) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() == EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(event);
    }

    fn since(&self, unix_ms: u64, max: usize) -> Vec<Event> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = events.iter().rev().take_while(|event| event.at_unix_ms >= unix_ms).take(max);
        let mut found: Vec<Event> = newest.cloned().collect();
        found.reverse();
        found
    }
}

/// The newest events of this process from a time on, milliseconds since 1970, the oldest first; at most `max`, without
/// the name of a node.
pub fn recent(since_unix_ms: u64, max: usize) -> Vec<Event> {
    RECENT.since(since_unix_ms, max)
}

/// Keeps what is logged.
pub(super) struct Keeper;

/// Whether something that is logged is an event.
pub(super) fn is_event(metadata: &Metadata<'_>) -> bool {
    *metadata.level() <= Level::INFO && metadata.target().split("::").next() == Some("sds")
}

impl<S: Subscriber> Layer<S> for Keeper {
    fn on_event(&self, logged: &Logged<'_>, _: Context<'_, S>) {
        RECENT.push(read(logged));
    }
}

fn read(logged: &Logged<'_>) -> Event {
    let mut fields = Fields::default();
    logged.record(&mut fields);
    let level = match *logged.metadata().level() {
        Level::ERROR => EventLevel::Error,
        Level::WARN => EventLevel::Warning,
        _ => EventLevel::Info,
    };
    let target = logged.metadata().target();
    Event {
        at_unix_ms: u64::try_from(wall_clock().as_millis()).unwrap_or(u64::MAX),
        node: String::new(),
        level,
        part: target.strip_prefix("sds::").unwrap_or(target).to_owned(),
        message: fields.message,
        fields: fields.others,
    }
}

/// Takes the fields of a line of the log.
#[derive(Default)]
struct Fields {
    message: String,
    others: BTreeMap<String, String>,
}

impl Fields {
    fn take(&mut self, field: &Field, mut text: String) {
        if text.len() > TEXT_BYTES_MAX {
            text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
            text.push('…');
        }
        if field.name() == "message" {
            self.message = text;
        } else if self.others.len() < FIELDS_MAX {
            self.others.insert(field.name().to_owned(), text);
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut text = String::new();
        write!(text, "{value:?}").expect("a string takes all");
        self.take(field, text);
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn lines_of_the_log_become_events() {
        let keeper = Keeper.with_filter(tracing_subscriber::filter::filter_fn(is_event));
        let before = recent(0, usize::MAX).len();
        let subscriber = tracing_subscriber::registry().with(keeper);
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(target: "sds::disk", disk = "d1", slots = 7, "the disk burns");
            tracing::debug!(target: "sds::disk", "nobody cares");
            tracing::info!(target: "hyper", "another house");
            tracing::info!(target: "sds", text = "x".repeat(1000), "long");
        });
        let events = recent(0, usize::MAX);
        let [burns, long] = &events[before..] else { panic!("{events:?}") };
        assert_eq!((burns.level, burns.part.as_str()), (EventLevel::Warning, "disk"));
        assert_eq!(burns.message, "the disk burns");
        assert_eq!(burns.fields["slots"], "7");
        assert_eq!(burns.fields["disk"], "d1");
        assert!(burns.at_unix_ms > 1_700_000_000_000);
        assert!(long.fields["text"].len() <= TEXT_BYTES_MAX + 3);
    }

    #[test]
    fn the_newest_are_kept() {
        let kept = Recent { events: Mutex::default() };
        for at_unix_ms in 0..EVENTS_MAX as u64 + 5 {
            kept.push(Event { at_unix_ms, ..Event::default() });
        }
        assert_eq!(kept.since(0, usize::MAX).len(), EVENTS_MAX);
        let newest: Vec<u64> = kept.since(2_000, 3).iter().map(|event| event.at_unix_ms).collect();
        assert_eq!(newest, [2_002, 2_003, 2_004]);
    }
}
