//! The scrubs of a node's volumes, as the admin API shows and starts them.
//!
//! Decides nothing: a head paces and repairs by itself ([`crate::volume::ScrubReport`]).

use std::rc::Rc;

use super::Node;
use super::volumes::VolumeSlot;
use crate::admin::error::ApiError;
use crate::admin::types::{Scrub, ScrubState, VolumeName};
use crate::volume::ScrubReport;

impl Node {
    /// The scrubs of all volumes, sorted by name.
    pub(super) fn list_scrubs(&self) -> Vec<Scrub> {
        view_scrubs(self.volumes.borrow().values().cloned())
    }

    /// Begins to scrub one volume, or all that are served.
    pub(super) fn start_scrubs(&self, volume: Option<&VolumeName>) -> Result<Vec<Scrub>, ApiError> {
        let slots = match volume {
            Some(name) => {
                let slot = self.find_volume(name)?;
                if slot.serving().is_none() {
                    return Err(ApiError::unavailable(format!(
                        "volume {name} is not served: {}",
                        slot.why_not()
                    )));
                }
                vec![slot]
            }
            None => self.volumes.borrow().values().cloned().collect(),
        };
        let served: Vec<_> = slots.into_iter().filter(|slot| slot.serving().is_some()).collect();
        for head in served.iter().filter_map(|slot| slot.serving()) {
            head.start_scrub();
        }
        Ok(view_scrubs(served.into_iter()))
    }
}

fn view_scrubs(slots: impl Iterator<Item = Rc<VolumeSlot>>) -> Vec<Scrub> {
    let mut list: Vec<Scrub> = slots.map(|slot| view_scrub(&slot)).collect();
    list.sort_by(|a, b| a.volume.cmp(&b.volume));
    list
}

fn view_scrub(slot: &VolumeSlot) -> Scrub {
    let report = slot.serving().map(|head| head.scrub_report());
    let state = match &report {
        None => ScrubState::Unavailable,
        Some(report) if report.running => ScrubState::Running,
        Some(_) => ScrubState::Idle,
    };
    let ScrubReport { done_bytes, total_bytes, unchecked_bytes, eta, finished_at, .. } =
        report.clone().unwrap_or_default();
    let ScrubReport { found, repaired, unrepairable, .. } = report.unwrap_or_default();
    Scrub {
        volume: slot.name(),
        state,
        bytes_done: done_bytes,
        bytes_total: total_bytes,
        bytes_unchecked: unchecked_bytes,
        eta_s: eta.map(|eta| eta.as_secs()),
        finished_at,
        found,
        repaired,
        unrepairable,
    }
}
