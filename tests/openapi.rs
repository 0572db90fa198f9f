//! `docs/openapi.json` is what the code says, and every path in it is served.
//!
//! After a wanted change of the API: `SDS_BLESS=1 cargo test --test openapi`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod admin_support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use admin_support::FakeNode;

#[test]
fn the_document_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    let now = sds::admin::server::openapi_json();
    if std::env::var_os("SDS_BLESS").is_some() {
        fs::write(&path, &now).unwrap();
    }
    let checked_in = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        now == checked_in,
        "docs/openapi.json differs from the code; if the change is wanted: \
         SDS_BLESS=1 cargo test --test openapi, and commit it"
    );
}

#[test]
fn every_path_of_the_document_is_served() {
    let node = FakeNode::start();
    let document: serde_json::Value =
        serde_json::from_str(&sds::admin::server::openapi_json()).unwrap();
    let mut operations = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let concrete =
            path.replace("{disk}", "x").replace("{pool}", "default").replace("{name}", "vol0");
        for (method, operation) in methods.as_object().unwrap() {
            let answer = request(&node, &method.to_uppercase(), &concrete);
            assert!(!answer.contains("\"message\":\"no such path: "), "{method} {path}: {answer}");
            assert!(!answer.starts_with("HTTP/1.1 405"), "{method} {path}: {answer}");
            let status = &answer[9..12];
            assert!(
                operation["responses"].get(status).is_some() || status == "415",
                "{method} {path} answers {status}, which the document lacks"
            );
            operations += 1;
        }
    }
    assert_eq!(operations, 32, "the document and the router have grown together");
}

fn request(node: &FakeNode, method: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(node.address).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
