//! `sdsctl inspect segment`: the records of one shard, and the checksums of its blocks.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Serialize;

use super::super::output::{Table, fields};
use super::disk::{ShardView, VolumeName};
use super::{Subject, hex, kind_text, scheme_text, state_text};
use crate::disk::{Inspection, ShardReader};
use crate::id::{BLOCK_SIZE, DiskId, HeadId, Lsn};
use crate::limits::RECORD_HEADER_BLOCKS_MAX;
use crate::segment::checksum::{Salt, ZERO_BLOCK_CRC, raw_crcs};
use crate::segment::record::{CheckpointPlace, Entry, Header};
use crate::shard::{SegmentKind, ShardState};

/// Blocks read at once.
const WINDOW_BLOCKS: u32 = 256;

/// What a block was found to be.
pub(super) struct Fact {
    /// Its salted checksum, or why it cannot be read.
    pub(super) computed: Result<u32, String>,
    /// It holds zeroes only.
    pub(super) zero: bool,
}

/// The blocks of one shard, read from the first on as far as they are asked for.
pub(super) struct Shard<'a> {
    reader: &'a ShardReader<'a>,
    salt: Salt,
    facts: Vec<Fact>,
}

impl<'a> Shard<'a> {
    pub(super) fn new(reader: &'a ShardReader<'a>) -> Self {
        let spec = &reader.record().spec;
        let salt = Salt::new(spec.volume, spec.segment, spec.scheme, spec.index.into());
        Self { reader, salt, facts: Vec::new() }
    }

    /// Looks at all blocks below `end`.
    pub(super) async fn facts(&mut self, end: u32) -> &[Fact] {
        let end = end.min(self.reader.blocks_max());
        loop {
            let have = u32::try_from(self.facts.len()).expect("as many as a slot has");
            let count = end.saturating_sub(have).min(WINDOW_BLOCKS);
            if count == 0 {
                return &self.facts;
            }
            match self.reader.read(have, count).await {
                Ok(data) => self.take(have, &data),
                // One bad sector costs its block only.
                Err(_) => {
                    for block in have..have + count {
                        match self.reader.read(block, 1).await {
                            Ok(data) => self.take(block, &data),
                            Err(error) => self
                                .facts
                                .push(Fact { computed: Err(error.to_string()), zero: false }),
                        }
                    }
                }
            }
        }
    }

    fn take(&mut self, first: u32, data: &Bytes) {
        let salt = self.salt;
        let facts = (first..).zip(raw_crcs(data)).map(|(block, raw)| {
            let start = (block - first) as usize * BLOCK_SIZE;
            let zero = raw == ZERO_BLOCK_CRC
                && data[start..start + BLOCK_SIZE].iter().all(|byte| *byte == 0);
            Fact { computed: Ok(salt.apply(block, raw)), zero }
        });
        self.facts.extend(facts);
    }

    /// The header of the record at `block`, or why there is none.
    pub(super) async fn header(&self, block: u32) -> Result<Header, String> {
        let record = self.reader.record();
        let most = u32::try_from(RECORD_HEADER_BLOCKS_MAX).expect("small");
        let left = self.reader.blocks_max().saturating_sub(block);
        if left == 0 {
            return Err("the shard ends before it".to_owned());
        }
        let bytes = match self.reader.read(block, most.min(left)).await {
            Ok(bytes) => bytes,
            Err(_) => self.reader.read(block, 1).await.map_err(|error| error.to_string())?,
        };
        let header = Header::decode(&bytes).map_err(|error| error.to_string())?;
        let spec = &record.spec;
        let index = if spec.kind == SegmentKind::Data { spec.index } else { 0 };
        if !header.is_at(spec.volume, spec.segment, index, block) {
            return Err(format!(
                "a record of another place: volume {}, segment {}, shard {}, block {}",
                header.volume, header.segment, header.shard, header.block
            ));
        }
        if header.blocks() > left {
            return Err(format!("the record of {} blocks goes beyond the end", header.blocks()));
        }
        Ok(header)
    }

    /// The payload blocks of a record that do not match the checksums of its header.
    pub(super) async fn bad_payload(&mut self, header: &Header) -> Vec<u32> {
        let first = header.block + header.header_blocks;
        let facts = self.facts(header.block + header.blocks()).await;
        let payload = (first..).zip(facts[first as usize..].iter().zip(&header.crcs));
        let bad = payload.filter(|(_, (fact, stored))| fact.computed.as_ref() != Ok(stored));
        bad.map(|(block, _)| block).collect()
    }
}

/// All that `inspect segment` shows.
#[derive(Serialize)]
pub(super) struct SegmentReport {
    #[serde(flatten)]
    subject: Subject,
    disk: DiskId,
    name: Option<VolumeName>,
    #[serde(flatten)]
    shard: ShardView,
    records: Vec<RecordLine>,
    end: End,
    /// Of sealed shards: what the disk's checksum area says.
    checksums: Option<ChecksumCounts>,
    /// With `--blocks`.
    #[serde(skip_serializing_if = "Option::is_none")]
    block_list: Option<Vec<BlockView>>,
}

/// A record, or blocks of a sealed shard where one should be.
#[derive(Serialize)]
struct RecordLine {
    block: u32,
    blocks: u32,
    lsn: Option<Lsn>,
    epoch: Option<String>,
    head: Option<HeadId>,
    acked: Option<Lsn>,
    checkpoint: Option<CheckpointPlace>,
    entries: BTreeMap<&'static str, u32>,
    payload_blocks: u32,
    /// Payload blocks that do not match the header's checksums.
    bad_blocks: Vec<u32>,
    fault: Option<String>,
}

/// Where the records end.
#[derive(Serialize)]
struct End {
    /// The block after the last record.
    block: u32,
    /// The longest run of whole records from the first on, blocks.
    whole_blocks: u32,
    why: String,
}

/// Blocks of a sealed shard against the checksum area.
#[derive(Serialize, Default)]
struct ChecksumCounts {
    ok: u32,
    bad: u32,
    unreadable: u32,
    /// Their checksum page does not count.
    unknown: u32,
    faults: Vec<String>,
}

#[derive(Serialize)]
struct BlockView {
    block: u32,
    /// `header`, `payload` or `nothing`.
    holds: &'static str,
    stored: Option<String>,
    computed: Option<String>,
    zero: bool,
    /// `ok`, `bad`, `unreadable` or `unknown`.
    state: &'static str,
}

pub(super) fn entry_kind(entry: &Entry) -> &'static str {
    match entry {
        Entry::Write { .. } => "write",
        Entry::Zero { .. } => "zero",
        Entry::Place { .. } => "place",
        Entry::Move { .. } => "move",
        Entry::Closed { .. } => "closed",
        Entry::Opened { .. } => "opened",
        Entry::Member { .. } => "member",
        Entry::Page { .. } => "page",
        Entry::Table { .. } => "table",
    }
}

/// The state of a block whose checksum should be `stored`.
pub(super) fn verdict(stored: Option<u32>, fact: &Fact) -> &'static str {
    match (stored, &fact.computed) {
        (_, Err(_)) => "unreadable",
        (None, _) => "unknown",
        (Some(stored), Ok(computed)) if stored == *computed => "ok",
        _ => "bad",
    }
}

/// What walking the records of a shard finds.
struct Walk {
    records: Vec<RecordLine>,
    end: End,
    /// What each block holds, and the checksum that the records have for it.
    holds: Vec<(&'static str, Option<u32>)>,
}

impl Walk {
    async fn of(shard: &mut Shard<'_>) -> Self {
        let sealed = shard.reader.record().state == ShardState::Sealed;
        let length = shard.reader.blocks_max();
        let (mut records, mut holds) = (Vec::new(), Vec::new());
        let (mut at, mut whole) = (0, None);
        let mut why = "the sealed length".to_owned();
        while at < length {
            let line = match shard.header(at).await {
                Ok(header) => {
                    let line = RecordLine::new(&header, shard.bad_payload(&header).await);
                    holds.extend((0..header.header_blocks).map(|_| ("header", None)));
                    holds.extend(header.crcs.iter().map(|crc| ("payload", Some(*crc))));
                    line
                }
                Err(fault) if sealed => {
                    let mut next = at + 1;
                    while next < length && shard.header(next).await.is_err() {
                        next += 1;
                    }
                    holds.extend((at..next).map(|_| ("nothing", None)));
                    RecordLine::fault(at, next - at, fault)
                }
                Err(fault) => {
                    why = fault;
                    break;
                }
            };
            if line.fault.is_some() || !line.bad_blocks.is_empty() {
                whole.get_or_insert(at);
            }
            at += line.blocks;
            records.push(line);
        }
        if !sealed && at == length {
            "the end of the slot".clone_into(&mut why);
        }
        let end = End { block: at, whole_blocks: whole.unwrap_or(at), why };
        Self { records, end, holds }
    }
}

impl RecordLine {
    fn new(header: &Header, bad_blocks: Vec<u32>) -> Self {
        let mut entries = BTreeMap::new();
        for entry in &header.entries {
            *entries.entry(entry_kind(entry)).or_default() += 1;
        }
        Self {
            block: header.block,
            blocks: header.blocks(),
            lsn: Some(header.lsn),
            epoch: Some(header.epoch.to_string()),
            head: Some(header.head),
            acked: Some(header.acked),
            checkpoint: (header.checkpoint.sequence > 0).then_some(header.checkpoint),
            entries,
            payload_blocks: header.payload_blocks,
            bad_blocks,
            fault: None,
        }
    }

    fn fault(block: u32, blocks: u32, fault: String) -> Self {
        Self {
            block,
            blocks,
            lsn: None,
            epoch: None,
            head: None,
            acked: None,
            checkpoint: None,
            entries: BTreeMap::new(),
            payload_blocks: 0,
            bad_blocks: Vec::new(),
            fault: Some(fault),
        }
    }

    fn verdict(&self) -> String {
        match (&self.fault, &self.bad_blocks[..]) {
            (Some(fault), _) => fault.clone(),
            (None, []) => "ok".to_owned(),
            (None, [one]) => format!("block {one} is bad"),
            (None, [first, ..]) => {
                format!("{} blocks are bad, first {first}", self.bad_blocks.len())
            }
        }
    }
}

impl SegmentReport {
    pub(super) async fn read(
        subject: Subject,
        found: &Inspection,
        reader: &ShardReader<'_>,
        with_blocks: bool,
    ) -> Self {
        let mut shard = Shard::new(reader);
        let Walk { records, end, holds } = Walk::of(&mut shard).await;
        let sealed = reader.record().state == ShardState::Sealed;
        let (area, faults) = reader.checksums().await;
        let length = if sealed { reader.blocks_max() } else { end.block };
        let facts = shard.facts(length).await;
        let mut counts = ChecksumCounts { faults, ..ChecksumCounts::default() };
        let mut blocks = Vec::new();
        for (block, fact) in (0..length).zip(facts) {
            let index = block as usize;
            let (holds, of_record) = holds.get(index).copied().unwrap_or(("nothing", None));
            let stored = if sealed { area.get(index).copied().flatten() } else { of_record };
            // A header that was decoded has a checksum of its own.
            let state = match (sealed, holds) {
                (false, "header") => "ok",
                _ => verdict(stored, fact),
            };
            *match state {
                "ok" => &mut counts.ok,
                "bad" => &mut counts.bad,
                "unreadable" => &mut counts.unreadable,
                _ => &mut counts.unknown,
            } += 1;
            if with_blocks {
                let computed = fact.computed.as_ref().ok().copied().map(hex);
                let stored = stored.map(hex);
                blocks.push(BlockView { block, holds, stored, computed, zero: fact.zero, state });
            }
        }
        let volume = reader.record().spec.volume;
        let fence = found.volumes.iter().find(|fence| fence.volume == volume);
        Self {
            subject,
            disk: found.superblock.disk,
            name: fence.and_then(VolumeName::of),
            shard: ShardView::new(reader.slot(), reader.record()),
            records,
            end,
            checksums: sealed.then_some(counts),
            block_list: with_blocks.then_some(blocks),
        }
    }

    /// What is damaged. An open shard may well end in a torn record; a sealed one must be whole.
    pub(super) fn damage(&self) -> Option<String> {
        let counts = self.checksums.as_ref()?;
        let bad = counts.bad + counts.unreadable + counts.unknown;
        let torn = self.records.iter().filter(|r| r.fault.is_some() || !r.bad_blocks.is_empty());
        let torn = torn.count();
        let segment = self.shard.segment;
        (bad > 0 || torn > 0).then(|| {
            format!(
                "the shard of segment {segment} is damaged: {bad} blocks do not match their \
                 checksum or cannot be read, {torn} records are not whole"
            )
        })
    }

    pub(super) fn text(&self) -> String {
        let view = &self.shard;
        let name = self.name.as_ref().map_or_else(String::new, |name| format!(" ({})", name.0));
        let members = (0..).zip(&view.members).map(|(index, disk)| format!("{index}:{disk}"));
        let length = view.blocks.map_or_else(String::new, |blocks| format!(", {blocks} blocks"));
        let mut lines = self.subject.lines();
        lines.extend([
            ("disk", self.disk.to_string()),
            ("slot", view.slot.to_string()),
            ("volume", format!("{}{name}", view.volume)),
            ("segment", format!("{}, {}", view.segment, kind_text(view.kind))),
            ("scheme", format!("{}, this is shard {}", scheme_text(view.scheme), view.shard)),
            ("write set", members.collect::<Vec<_>>().join(" ")),
            ("creation", format!("{:016x}", view.creation)),
            ("epoch", view.epoch.to_string()),
            ("state", format!("{}{length}", state_text(view.state))),
        ]);
        if let Some(counts) = &self.checksums {
            let ChecksumCounts { ok, bad, unreadable, unknown, faults } = counts;
            let counts =
                format!("{ok} ok, {bad} bad, {unreadable} unreadable, {unknown} without checksum");
            let all: Vec<String> = std::iter::once(counts).chain(faults.clone()).collect();
            lines.push(("blocks", all.join("; ")));
        }
        let End { block, whole_blocks, why } = &self.end;
        lines
            .push(("records", format!("{}, whole up to block {whole_blocks}", self.records.len())));
        lines.push(("end", format!("block {block}: {why}")));
        let mut parts = vec![fields(&lines)];
        if !self.records.is_empty() {
            parts.push(format!("\n{}", record_table(&self.records)));
        }
        if let Some(blocks) = &self.block_list {
            parts.push(format!("\n{}", block_table(blocks)));
        }
        parts.concat()
    }
}

fn record_table(records: &[RecordLine]) -> String {
    let mut table = Table::new(&[
        ">BLOCK",
        ">BLOCKS",
        ">LSN",
        "EPOCH",
        ">ACKED",
        "CHECKPOINT",
        "ENTRIES",
        "CHECKSUMS",
    ]);
    let dash = || "-".to_owned();
    for record in records {
        let lsn = |lsn: Option<Lsn>| lsn.filter(|l| l.0 > 0).map_or_else(dash, |l| l.to_string());
        let checkpoint = record.checkpoint.map_or_else(dash, |place| {
            format!("#{} at {}/{}", place.sequence, place.segment, place.block)
        });
        let entries: Vec<String> =
            record.entries.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        table.row(vec![
            record.block.to_string(),
            record.blocks.to_string(),
            lsn(record.lsn),
            record.epoch.clone().unwrap_or_else(dash),
            lsn(record.acked),
            checkpoint,
            super::super::output::non_empty(entries.join(", "), "-"),
            record.verdict(),
        ]);
    }
    table.render()
}

fn block_table(blocks: &[BlockView]) -> String {
    let mut table = Table::new(&[">BLOCK", "HOLDS", "STORED", "COMPUTED", "STATE"]);
    for view in blocks {
        let crc = |crc: &Option<String>| crc.clone().unwrap_or_else(|| "-".to_owned());
        let holds = if view.zero { format!("{} (zeroes)", view.holds) } else { view.holds.into() };
        let (stored, computed) = (crc(&view.stored), crc(&view.computed));
        table.row(vec![view.block.to_string(), holds, stored, computed, view.state.to_owned()]);
    }
    table.render()
}
