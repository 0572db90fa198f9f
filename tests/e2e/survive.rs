//! The node of a client dies, and the client goes on at another one, as `tools/survive` does and judges it.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

#[test]
fn a_client_of_two_nodes_goes_on_at_the_second_and_finds_what_it_wrote() {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/survive");
    let sdsd = PathBuf::from(env!("CARGO_BIN_EXE_sdsd"));
    let bin = sdsd.parent().expect("a directory");
    let arguments = ["--only", "3", "moving", "--away", "3", "-o", "json", "--bin"];
    let done = Command::new(tool).args(arguments).arg(bin).output();
    let done = done.expect("tools/survive can be run");
    let said = String::from_utf8_lossy(&done.stdout);
    let error = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}{error}");
    println!("{error}");
    let result: Value = serde_json::from_str(&said).expect("JSON");
    let kills = result["kills"].as_array().expect("a list");
    // A node with the head, one without, and the gateway with it.
    let heads: Vec<_> = kills.iter().map(|kill| kill["head"] == true).collect();
    assert_eq!(heads, [true, false, true], "{said}");
    for kill in kills {
        assert_eq!(kill["errors"], Value::Array(vec![]), "{said}");
        assert!(kill["requests"].as_u64() > Some(50), "{said}");
    }
}
