//! Partitions of real nodes under clients that record what they see, as `tools/partitions` makes and judges them.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

#[test]
fn what_clients_saw_in_partitions_is_explained_by_one_order_in_namespaces() {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/partitions");
    let sdsd = PathBuf::from(env!("CARGO_BIN_EXE_sdsd"));
    let bin = sdsd.parent().expect("a directory");
    let done = Command::new(tool).args(["-o", "json", "--rounds", "5", "--bin"]).arg(bin).output();
    let done = done.expect("tools/partitions can be run");
    let said = String::from_utf8_lossy(&done.stdout);
    let error = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}{error}");
    println!("{said}");
    let lines: Vec<Value> =
        said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let faults = lines.iter().filter(|line| line["fault"].is_string()).count();
    let result = lines.last().expect("a result");
    assert_eq!((faults, result["rounds"].as_u64()), (5, Some(5)), "{said}");
    assert_eq!(result["wrong"], Value::Array(vec![]), "{said}");
    let count = |what: &str| result[what].as_u64().unwrap_or(0);
    assert!(count("reads") > 1_000 && count("writes") > 1_000, "{said}");
}
