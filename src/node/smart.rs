//! What a device says of itself: SMART data, by `smartctl` where that is installed.
//!
//! The program is started and reaped on a thread for such, and its output read without waiting: it
//! may hang with its device. Absent, it says nothing, and nothing is said of it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::time::timeout;

use crate::admin::types::Smart;

/// How long the program may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest output that is looked at, bytes.
const OUTPUT_MAX: u64 = 1 << 20;

/// Asks the device at `path`; none if it is no block device, there is no `smartctl`, or it has
/// nothing to say.
pub(super) async fn read(path: String) -> Option<Smart> {
    let mut child = tokio::task::spawn_blocking(move || start(&path)).await.ok()?.ok()?;
    let output = match child.stdout.take() {
        Some(stdout) => timeout(PATIENCE, collect(OwnedFd::from(stdout))).await,
        None => return None,
    };
    // A killed one is reaped too; one that hangs in the kernel keeps a thread, not the core.
    drop(tokio::task::spawn_blocking(move || {
        child.kill().ok();
        child.wait().ok()
    }));
    parse(&output.ok()?.ok()?)
}

fn start(path: &str) -> io::Result<Child> {
    if !std::fs::metadata(path)?.file_type().is_block_device() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Command::new("smartctl")
        .args(["-j", "-a", path])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
}

async fn collect(stdout: OwnedFd) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    Receiver::from_owned_fd(stdout)?.take(OUTPUT_MAX).read_to_end(&mut output).await?;
    Ok(output)
}

/// What matters of `smartctl -j -a`; none if that is no such output.
fn parse(output: &[u8]) -> Option<Smart> {
    let all: Value = serde_json::from_slice(output).ok()?;
    let number = |pointer: &str| all.pointer(pointer).and_then(Value::as_u64);
    let attribute = |id: u64| {
        let table = all.pointer("/ata_smart_attributes/table")?.as_array()?;
        let row = table.iter().find(|row| row["id"].as_u64() == Some(id))?;
        row.pointer("/raw/value")?.as_u64()
    };
    let nvme = |field: &str| number(&format!("/nvme_smart_health_information_log/{field}"));
    let smart = Smart {
        passed: all.pointer("/smart_status/passed").and_then(Value::as_bool),
        model: all.pointer("/model_name").and_then(Value::as_str).map(str::to_owned),
        temperature_c: all.pointer("/temperature/current").and_then(Value::as_i64),
        power_on_hours: number("/power_on_time/hours"),
        reallocated_sectors: attribute(5),
        pending_sectors: attribute(197),
        uncorrectable_sectors: attribute(198),
        media_errors: nvme("media_errors"),
        wear_percent: nvme("percentage_used"),
    };
    (smart != Smart::default()).then_some(smart)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_ata_and_nvme_are_found() {
        let ata =
            br#"{"smart_status":{"passed":false},"model_name":"X1","temperature":{"current":41},
            "power_on_time":{"hours":1234},"ata_smart_attributes":{"table":[
            {"id":5,"raw":{"value":7}},{"id":197,"raw":{"value":2}}]}}"#;
        let smart = parse(ata).expect("an answer");
        assert_eq!((smart.passed, smart.reallocated_sectors), (Some(false), Some(7)));
        assert_eq!((smart.pending_sectors, smart.uncorrectable_sectors), (Some(2), None));
        let nvme = br#"{"nvme_smart_health_information_log":{"media_errors":3,
            "percentage_used":9}}"#;
        let smart = parse(nvme).expect("an answer");
        assert_eq!((smart.media_errors, smart.wear_percent), (Some(3), Some(9)));
        assert_eq!((parse(b"{}"), parse(b"smartctl: not json"), parse(b"[1]")), (None, None, None));
    }

    #[tokio::test]
    async fn a_file_and_nothing_at_all_say_nothing() {
        assert_eq!(read("/dev/null".into()).await, None);
        assert_eq!(read("/nowhere".into()).await, None);
    }
}
