//! The invariants of a disk as one function, for tests and the simulation.

use crate::disk::Disk;
use crate::disk::tables::{Phase, Slot, Tables};
use crate::id::Epoch;
use crate::shard::ShardState;

impl Disk {
    /// Checks every invariant of the tables in memory; the error says what is broken. Linear in
    /// the number of slots, no I/O.
    pub fn check(&self) -> Result<(), String> {
        let tables = self.tables.borrow();
        if tables.slots.len() != self.geometry.slots as usize {
            return Err(format!("{} slots", tables.slots.len()));
        }
        for (key, number) in &tables.shards {
            let slot = &tables.slots[*number as usize];
            let found = slot.record.as_ref().map(|r| (r.spec.volume, r.spec.segment));
            if found != Some(*key) {
                return Err(format!("slot {number} holds {found:?}, not {key:?}"));
            }
        }
        for (number, slot) in (0..).zip(&tables.slots) {
            check_slot(&tables, number, slot).map_err(|e| format!("slot {number}: {e}"))?;
        }
        check_volumes(&tables)
    }
}

fn check_slot(tables: &Tables, number: u32, slot: &Slot) -> Result<(), String> {
    let holds = matches!(slot.phase, Phase::Creating | Phase::Live | Phase::Deleting);
    if holds != slot.record.is_some() {
        return Err(format!("{:?} with record {:?}", slot.phase, slot.record));
    }
    if (slot.phase == Phase::Free) != tables.free.contains(&number) {
        return Err(format!("{:?}, but the free list differs", slot.phase));
    }
    if slot.phase == Phase::Freed && slot.pins == 0 {
        return Err("leaked: nothing pins it".into());
    }
    if slot.phase == Phase::Free && (slot.pins > 0 || slot.writer.is_some()) {
        return Err("free, but in use".into());
    }
    let Some(record) = &slot.record else { return Ok(()) };
    let key = (record.spec.volume, record.spec.segment);
    if tables.shards.get(&key) != Some(&number) {
        return Err(format!("{key:?} is not found there"));
    }
    if record.blocks > tables.geometry.slot_blocks() {
        return Err(format!("{} blocks", record.blocks));
    }
    let Some(volume) = tables.volumes.get(&record.spec.volume) else {
        // Its fence may be on an unreadable page.
        return if tables.damaged_volume_pages > 0 { Ok(()) } else { Err("no fence".into()) };
    };
    let forgotten = crate::planted::bug(crate::planted::Bug::ForgetFence);
    if volume.record.epoch < record.epoch && !forgotten {
        return Err(format!("{:?} is newer than its fence", record.epoch));
    }
    if record.state == ShardState::Open {
        if volume.record.epoch != record.epoch {
            return Err("open in an epoch that was fenced".into());
        }
        let writer = slot.writer.as_ref().ok_or("open without a writer")?;
        writer.check(tables.geometry.slot_blocks())?;
    }
    if record.state == ShardState::Sealed && slot.writer.is_some() {
        return Err("sealed with a writer".into());
    }
    Ok(())
}

fn check_volumes(tables: &Tables) -> Result<(), String> {
    let mut pages = tables.volume_pages_free.clone();
    for (id, volume) in &tables.volumes {
        if *id != volume.record.volume || !pages.insert(volume.page) {
            return Err(format!("volume {id}: page {} is taken", volume.page));
        }
        if volume.forgotten && volume.record.epoch != Epoch::TOMBSTONE {
            return Err(format!("volume {id}: forgotten alive"));
        }
    }
    let count = pages.len() + tables.damaged_volume_pages as usize;
    if count != tables.geometry.volumes_max as usize {
        return Err(format!("{count} volume pages"));
    }
    Ok(())
}
