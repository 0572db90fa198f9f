//! `sdsctl inspect record`: one record with every entry and every checksum.

use serde::Serialize;

use super::super::output::{Table, fields};
use super::disk::VolumeName;
use super::shard::{Shard, entry_kind, verdict};
use super::{InspectError, Subject, as_text, hex, kind_text};
use crate::disk::{Inspection, ShardReader};
use crate::id::{DiskId, Epoch, HeadId, Lsn, SegmentId, VolumeId};
use crate::segment::BlockAddr;
use crate::segment::record::{CheckpointPlace, Entry, Header};
use crate::shard::{Scheme, SegmentKind};

/// All that `inspect record` shows.
#[derive(Serialize)]
pub(super) struct RecordReport {
    #[serde(flatten)]
    subject: Subject,
    disk: DiskId,
    name: Option<VolumeName>,
    volume: VolumeId,
    segment: SegmentId,
    kind: SegmentKind,
    shard: u8,
    block: u32,
    header_blocks: u32,
    payload_blocks: u32,
    #[serde(serialize_with = "as_text")]
    epoch: Epoch,
    head: HeadId,
    lsn: Lsn,
    acked: Lsn,
    checkpoint: Option<CheckpointPlace>,
    entries: Vec<Entry>,
    payload: Vec<PayloadView>,
}

/// A payload block.
#[derive(Serialize)]
struct PayloadView {
    block: u32,
    /// What it is, where the entries tell: parity is nobody's.
    holds: Option<String>,
    stored: String,
    computed: Option<String>,
    zero: bool,
    /// `ok`, `bad` or `unreadable`.
    state: &'static str,
}

impl RecordReport {
    pub(super) async fn read(
        subject: Subject,
        found: &Inspection,
        reader: &ShardReader<'_>,
        block: u32,
    ) -> Result<Self, InspectError> {
        let spec = &reader.record().spec;
        let mut shard = Shard::new(reader);
        let header = shard.header(block).await.map_err(|fault| InspectError::Nothing {
            message: format!(
                "{}: block {block} of segment {}: {fault}",
                subject.path, spec.segment
            ),
            hint: Some(format!(
                "where records begin: sdsctl inspect segment {} {} {}",
                subject.path, spec.volume, spec.segment
            )),
        })?;
        let first = block + header.header_blocks;
        let facts = shard.facts(block + header.blocks()).await;
        let facts = facts.iter().skip(first as usize).zip(&header.crcs);
        let owners = owners(&header, spec.scheme);
        let payload =
            (first..).zip(facts).enumerate().map(|(i, (block, (fact, stored)))| PayloadView {
                block,
                holds: owners.get(i).cloned(),
                stored: hex(*stored),
                computed: fact.computed.as_ref().ok().copied().map(hex),
                zero: fact.zero,
                state: verdict(Some(*stored), fact),
            });
        let fence = found.volumes.iter().find(|fence| fence.volume == spec.volume);
        Ok(Self {
            disk: found.superblock.disk,
            name: fence.and_then(VolumeName::of),
            volume: header.volume,
            segment: header.segment,
            kind: header.kind,
            shard: header.shard,
            block: header.block,
            header_blocks: header.header_blocks,
            payload_blocks: header.payload_blocks,
            epoch: header.epoch,
            head: header.head,
            lsn: header.lsn,
            acked: header.acked,
            checkpoint: (header.checkpoint.sequence > 0).then_some(header.checkpoint),
            payload: payload.collect(),
            entries: header.entries,
            subject,
        })
    }

    /// What is damaged, if anything is.
    pub(super) fn damage(&self) -> Option<String> {
        let bad = self.payload.iter().filter(|block| block.state != "ok").count();
        (bad > 0).then(|| {
            format!("the record is damaged: {bad} of {} payload blocks", self.payload.len())
        })
    }

    pub(super) fn text(&self) -> String {
        let name = self.name.as_ref().map_or_else(String::new, |name| format!(" ({})", name.0));
        let checkpoint = self.checkpoint.map_or_else(
            || "none".to_owned(),
            |place| {
                format!(
                    "#{} up to LSN {}, segment {} block {}, {} blocks, CRC {}",
                    place.sequence,
                    place.lsn,
                    place.segment,
                    place.block,
                    place.blocks,
                    hex(place.crc)
                )
            },
        );
        let mut lines = self.subject.lines();
        lines.extend([
            ("disk", self.disk.to_string()),
            ("volume", format!("{}{name}", self.volume)),
            (
                "segment",
                format!("{}, {}, shard {}", self.segment, kind_text(self.kind), self.shard),
            ),
            (
                "blocks",
                format!(
                    "{} to {}: {} of header (checksum ok), {} of payload",
                    self.block,
                    self.block + self.header_blocks + self.payload_blocks - 1,
                    self.header_blocks,
                    self.payload_blocks
                ),
            ),
            ("epoch", self.epoch.to_string()),
            ("head", self.head.to_string()),
            ("LSN", self.lsn.to_string()),
            ("acknowledged", format!("up to LSN {}", self.acked)),
            ("checkpoint", checkpoint),
        ]);
        let mut parts = vec![fields(&lines)];
        if !self.entries.is_empty() {
            let mut table = Table::new(&[">ENTRY", "KIND", "SAYS"]);
            for (index, entry) in self.entries.iter().enumerate() {
                let kind = entry_kind(entry).to_owned();
                table.row(vec![index.to_string(), kind, says(entry)]);
            }
            parts.push(format!("\n{}", table.render()));
        }
        if !self.payload.is_empty() {
            let mut table = Table::new(&[">BLOCK", "HOLDS", "STORED", "COMPUTED", "STATE"]);
            for view in &self.payload {
                let holds = view.holds.clone().unwrap_or_else(|| "-".to_owned());
                let zero = if view.zero { " (zeroes)" } else { "" };
                let computed = view.computed.clone().unwrap_or_else(|| "-".to_owned());
                let stored = view.stored.clone();
                let state = view.state.to_owned();
                table.row(vec![view.block.to_string(), holds + zero, stored, computed, state]);
            }
            parts.push(format!("\n{}", table.render()));
        }
        parts.concat()
    }
}

/// What each payload block of this shard is: copies hold all that the entries name, a data shard
/// of an erasure-coded segment its part in order, a parity shard none of it.
fn owners(header: &Header, scheme: Scheme) -> Vec<String> {
    let payload = header.payload_blocks as usize;
    let all = header.entries.iter().flat_map(|entry| {
        (0..entry.payload_blocks()).map(move |i| match entry {
            Entry::Write { lba, .. } => format!("LBA {}", lba + u64::from(i)),
            Entry::Page { level, number } => format!("index page {level}/{number}"),
            _ => format!("table block {i}"),
        })
    });
    match scheme.data {
        1 => all.take(payload).collect(),
        data if header.shard < data => {
            all.skip(usize::from(header.shard) * payload).take(payload).collect()
        }
        _ => Vec::new(),
    }
}

fn place(addr: BlockAddr) -> String {
    format!("segment {} block {}", addr.segment, addr.block)
}

/// `blocks` blocks from `lba` on.
fn run(lba: u64, blocks: u64) -> String {
    match blocks {
        0 => format!("LBA {lba}, no blocks"),
        1 => format!("LBA {lba}"),
        _ => format!("LBA {lba} to {}", lba + blocks - 1),
    }
}

fn says(entry: &Entry) -> String {
    match *entry {
        Entry::Write { lba, blocks } => format!("{}: payload", run(lba, blocks.into())),
        Entry::Zero { lba, blocks, allocated } => {
            let how = if allocated { "zeroes, allocated" } else { "zeroes" };
            format!("{}: {how}", run(lba, blocks))
        }
        Entry::Place { lba, blocks, addr } => {
            format!("{}: at {}", run(lba, blocks.into()), place(addr))
        }
        Entry::Move { lba, blocks, from, to } => {
            let run = run(lba, blocks.into());
            format!("{run}: from {} to {}", place(from), place(to))
        }
        Entry::Closed { segment, blocks, bad } => {
            let bad = if bad == 0 { String::new() } else { format!(", members {bad:#b} failed") };
            format!("log segment {segment} ended at block {blocks}{bad}")
        }
        Entry::Opened { segment, data, parity, shard_blocks, creation } => format!(
            "data segment {segment}: {data}+{parity}, {shard_blocks} blocks a shard, creation \
             {creation:016x}"
        ),
        Entry::Member { index, disk } => format!("shard {index} on disk {disk}"),
        Entry::Page { level, number } => format!("page {number} of level {level}: payload"),
        Entry::Table { blocks } => format!("{blocks} blocks of payload"),
    }
}
