//! A virtual machine with its disk on a volume, over the death and the restart of every node, as `tools/guest` runs it.

use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn a_guest_sees_no_error_while_nodes_die_and_are_restarted() {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/guest");
    let sdsd = PathBuf::from(env!("CARGO_BIN_EXE_sdsd"));
    let bin = sdsd.parent().expect("a directory");
    let done = Command::new(tool).args(["-o", "json", "--bin"]).arg(bin).output();
    let done = done.expect("tools/guest can be run");
    let said = String::from_utf8_lossy(&done.stdout);
    let error = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}{error}");
    let lines: Vec<serde_json::Value> =
        said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    println!("{said}");
    // Nothing, a storage node and the gateway killed, six restarts, and the end.
    assert_eq!(lines.len(), 10, "{said}");
    let rounds: Vec<u64> = lines.iter().map(|line| line["rounds"].as_u64().unwrap_or(0)).collect();
    assert!(rounds[0] > 0 && rounds.is_sorted(), "{said}");
    assert!(lines[9]["step"].as_str().is_some_and(|step| step.contains("clean")), "{said}");
}
