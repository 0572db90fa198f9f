//! What tests and the simulation see of a node, past its admin API.
//!
//! Nothing of a node's own code may call this.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::rc::Rc;

use super::Node;
use crate::admin::backend::Command;
use crate::id::{DiskId, VolumeId};
use crate::meta::record::DiskState;
use crate::volume::head::Head;

impl Node {
    /// The heads that serve here.
    pub fn served(&self) -> Vec<(VolumeId, Rc<Head>)> {
        let volumes = self.volumes.borrow();
        volumes.iter().filter_map(|(id, slot)| Some((*id, slot.serving()?))).collect()
    }

    /// The disks in use, near and far.
    pub fn disks_in_use(&self) -> BTreeSet<DiskId> {
        self.registry.ids().into_iter().collect()
    }

    /// The disks of this node that serve, with their paths.
    pub fn own_disks(&self) -> Vec<(String, DiskId)> {
        let slots = self.slots();
        let online = slots.iter().filter(|slot| slot.is_online());
        online.map(|slot| (slot.path(), slot.id)).collect()
    }

    /// Of this node's disks, those that an operator wants to be emptied.
    pub fn own_draining(&self) -> Vec<DiskId> {
        let slots = self.slots();
        let draining =
            slots.iter().filter(|slot| slot.record.borrow().state == DiskState::Draining);
        draining.map(|slot| slot.id).collect()
    }

    /// Whether a volume that was deleted is still being dropped from disks.
    pub fn is_deleting(&self) -> bool {
        !self.deleting.borrow().is_empty()
    }

    /// Carries out a command, as the admin API would have it done.
    pub async fn order(self: &Rc<Self>, command: Command) {
        self.answer(command).await;
    }

    /// What a node thinks of itself and of others, for the report of a failure.
    pub fn describe(&self) -> String {
        let mut text =
            format!("{}{}:", self.options.name, if self.is_manager() { " (manager)" } else { "" });
        for slot in self.volumes.borrow().values() {
            let head = slot.head.borrow().clone();
            let state = head.map_or_else(
                || slot.why_not(),
                |head| {
                    format!(
                        "epoch {} {}, reduced {:?}, width {:?}",
                        head.authority.epoch,
                        head.stopped()
                            .map_or_else(|| "serves".into(), |why| format!("stopped ({why})")),
                        head.reduced(),
                        head.log_width(),
                    )
                },
            );
            let closing = if slot.closing.get() { " closing" } else { "" };
            write!(text, " [{}{closing}: {state}]", slot.name()).ok();
        }
        for slot in self.slots().iter().filter(|slot| !slot.is_online()) {
            write!(text, " {} down: {:?}", slot.path(), slot.reason.borrow()).ok();
        }
        for (path, why) in &*self.problems.borrow() {
            write!(text, " {path} not used: {why}").ok();
        }
        for disk in self.far_disks().iter().filter(|disk| !disk.is_up()) {
            write!(text, " {} not up", disk.label()).ok();
        }
        text
    }
}
