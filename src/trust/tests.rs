//! Who is believed, over real connections, and which files are taken.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use rustls::pki_types::UnixTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::credentials::check_issued;
use super::testing::{authority, credentials, node, write};
use super::*;

const CLUSTER: ClusterId = ClusterId::from_bytes([0xc1; 16]);
const OTHER: ClusterId = ClusterId::from_bytes([0xc2; 16]);
const SECOND: NodeId = NodeId::from_bytes([2; 16]);

fn long_ago() -> UnixTime {
    let years_back = now().as_secs() - 2 * NODE_LIFETIME.as_secs();
    UnixTime::since_unix_epoch(Duration::from_secs(years_back))
}

fn admin(cluster: ClusterId) -> Holder {
    Holder { cluster, role: Role::Admin, name: "eve".into() }
}

/// What both ends say when one calls the other, meant to be [`SECOND`]: the caller once it has an answer.
async fn meet(caller: &Credentials, called: &Credentials) -> (io::Result<()>, io::Result<NodeId>) {
    meet_by(NodeTls::new(caller).unwrap().client(SECOND).unwrap(), called).await
}

async fn meet_by(
    connector: NodeConnector,
    called: &Credentials,
) -> (io::Result<()>, io::Result<NodeId>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = NodeTls::new(called).unwrap();
    let call = async move {
        let mut stream = connector.connect(TcpStream::connect(address).await?).await?;
        stream.read_u8().await.map(|_| ())
    };
    let answer = async move {
        let (mut stream, node) = server.accept(listener.accept().await?.0).await?;
        stream.write_u8(1).await?;
        stream.flush().await?;
        Ok(node)
    };
    tokio::join!(call, answer)
}

#[tokio::test]
async fn nodes_of_a_cluster_know_each_other() {
    let authority = authority(CLUSTER);
    let first = credentials(&authority, &node(CLUSTER, 1), now());
    let second = credentials(&authority, &node(CLUSTER, 2), now());
    let (call, answer) = meet(&first, &second).await;
    call.unwrap();
    assert_eq!(answer.unwrap(), NodeId::from_bytes([1; 16]));
    let (call, _) = meet(&second, &first).await;
    let why = call.unwrap_err().to_string();
    assert!(why.contains("(node1) is there, not 0202"), "{why}");
}

#[tokio::test]
async fn sessions_are_resumed_and_the_other_end_is_still_known() {
    let authority = authority(CLUSTER);
    let [first, second] =
        [1, 2].map(|n| NodeTls::new(&credentials(&authority, &node(CLUSTER, n), now())).unwrap());
    let connector = first.client(SECOND).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    for round in 0..2 {
        let address = listener.local_addr().unwrap();
        let call = async {
            let stream = TcpStream::connect(address).await.unwrap();
            let mut stream = connector.connect(stream).await.unwrap();
            // The tickets come with the first data.
            stream.read_u8().await.unwrap();
            stream.get_ref().1.handshake_kind()
        };
        let answer = async {
            let (mut stream, node) =
                second.accept(listener.accept().await.unwrap().0).await.unwrap();
            stream.write_u8(1).await.unwrap();
            stream.flush().await.unwrap();
            node
        };
        let (kind, caller) = tokio::join!(call, answer);
        assert_eq!(caller, NodeId::from_bytes([1; 16]));
        let resumed = kind == Some(rustls::HandshakeKind::Resumed);
        assert_eq!(resumed, round == 1, "{kind:?}");
    }
}

#[tokio::test]
async fn strangers_are_refused_by_both_ends() {
    let (ours, theirs, forged) = (authority(CLUSTER), authority(OTHER), authority(CLUSTER));
    let second = credentials(&ours, &node(CLUSTER, 2), now());
    let other = credentials(&theirs, &node(OTHER, 1), now());
    // The one that is called is of another cluster.
    let why = meet(&other, &second).await.0.unwrap_err().to_string();
    assert!(why.contains("node node2 of cluster c1c1") && why.contains("cluster c2c2"), "{why}");
    // The one that calls is: it believes whom it calls, since it was told another authority.
    let impostor = |holder: &Holder, by: &Authority, at: UnixTime| {
        let dir = tempfile::tempdir().unwrap();
        let layout = write(by, holder, at, dir.path());
        let mut made = Credentials::load_files(&layout).unwrap();
        made.trust_instead(ours.certificate().clone());
        made
    };
    let first = node(CLUSTER, 1);
    for (caller, expected) in [
        (impostor(&node(OTHER, 1), &theirs, now()), "of cluster c2c2"),
        (impostor(&first, &forged, now()), "not signed by the authority of cluster c1c1"),
        (impostor(&admin(CLUSTER), &ours, now()), "of admin eve, not of a node"),
        (impostor(&first, &ours, long_ago()), "expired"),
    ] {
        let (call, answer) = meet(&caller, &second).await;
        let why = answer.unwrap_err().to_string();
        assert!(why.contains(expected), "{expected}: {why}");
        call.expect_err("it is told so");
    }
    // An expired node is not believed when it is called either, nor an operator.
    let expired = impostor(&node(CLUSTER, 2), &ours, long_ago());
    let first = credentials(&ours, &first, now());
    let why = meet(&first, &expired).await.0.unwrap_err().to_string();
    assert!(why.contains("expired"), "{why}");
    let eve = credentials(&ours, &admin(CLUSTER), now());
    let why = meet(&first, &eve).await.0.unwrap_err().to_string();
    assert!(why.contains("extended key usage"), "an operator cannot serve: {why}");
}

#[tokio::test]
async fn who_knows_no_node_believes_any_of_the_cluster_and_no_other() {
    let (ours, theirs) = (authority(CLUSTER), authority(OTHER));
    let first = credentials(&ours, &node(CLUSTER, 1), now());
    let any = || NodeTls::new(&first).unwrap().client_of_any().unwrap();
    for called in [2, 3] {
        let (call, answer) =
            meet_by(any(), &credentials(&ours, &node(CLUSTER, called), now())).await;
        call.unwrap();
        assert_eq!(answer.unwrap(), NodeId::from_bytes([1; 16]));
    }
    let stranger = credentials(&theirs, &node(OTHER, 2), now());
    let why = meet_by(any(), &stranger).await.0.unwrap_err().to_string();
    assert!(why.contains("cluster c2c2"), "{why}");
    let eve = credentials(&ours, &admin(CLUSTER), now());
    meet_by(any(), &eve).await.0.expect_err("an operator is no node");
}

#[tokio::test]
async fn who_shows_no_certificate_or_speaks_no_tls_gets_nothing() {
    let ours = authority(CLUSTER);
    let second = credentials(&ours, &node(CLUSTER, 2), now());
    let server = NodeTls::new(&second).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let plain = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"sds, are you there? I am a node, really.").await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap_or_default();
        answer
    };
    let accept = async { server.accept(listener.accept().await.unwrap().0).await.map(|_| ()) };
    let (answer, refused) = tokio::join!(plain, accept);
    assert_eq!(refused.unwrap_err().to_string(), "TLS is not spoken there");
    assert!(answer.len() <= 7, "nothing but an alert: {answer:?}");

    let nobody = ClientTls::pinned(second.authority_fingerprint()).unwrap();
    let anonymous = async {
        let connector = tokio_rustls::TlsConnector::from(nobody.config.clone());
        let stream = TcpStream::connect(address).await.unwrap();
        connector.connect("localhost".try_into().unwrap(), stream).await.map(|_| ())
    };
    let accept = async { server.accept(listener.accept().await.unwrap().0).await.map(|_| ()) };
    let (_, refused) = tokio::join!(anonymous, accept);
    refused.expect_err("neither the protocol nor a certificate");
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let (ours, theirs) = (authority(CLUSTER), authority(OTHER));
    let dir = tempfile::tempdir().unwrap();
    let layout = write(&ours, &node(CLUSTER, 1), now(), dir.path());
    let loaded = Credentials::load(dir.path(), Kind::Node).unwrap();
    assert_eq!(*loaded.holder(), node(CLUSTER, 1));
    assert!(loaded.days_left(now()).is_some_and(|days| (729..=730).contains(&days)));
    assert!(!format!("{loaded:?}").contains("PRIVATE"));
    Credentials::load(dir.path(), Kind::Admin).expect_err("no admin.pem there");
    let why = || Credentials::load(dir.path(), Kind::Node).unwrap_err().to_string();

    let key = fs::read_to_string(&layout.key).unwrap();
    fs::set_permissions(&layout.key, fs::Permissions::from_mode(0o604)).unwrap();
    assert!(why().contains("node.key: others than its owner may use"), "{}", why());
    fs::set_permissions(&layout.key, fs::Permissions::from_mode(0o600)).unwrap();

    fs::write(&layout.key, SigningRequest::new().unwrap().key_pem()).unwrap();
    assert!(why().contains("node.key: not the key of"), "{}", why());
    fs::write(&layout.key, key.replace('A', "B")).unwrap();
    assert!(why().contains("node.key: ") && !why().contains("MIG"), "{}", why());
    fs::write(&layout.key, "nonsense").unwrap();
    assert!(why().contains("there is no private key in it"), "{}", why());

    fs::write(&layout.ca, theirs.pem()).unwrap();
    assert!(why().contains("node.pem: ") && why().contains("cluster c2c2"), "{}", why());
    fs::write(&layout.ca, fs::read(&layout.certificate).unwrap()).unwrap();
    assert!(why().contains("ca.pem: ") && why().contains("is no authority"), "{}", why());
}

#[test]
fn a_replacement_that_was_cut_short_is_ended() {
    let ours = authority(CLUSTER);
    let dir = tempfile::tempdir().unwrap();
    let layout = write(&ours, &node(CLUSTER, 1), now(), dir.path());
    let old_key = fs::read(&layout.key).unwrap();
    write(&ours, &node(CLUSTER, 1), now(), dir.path());
    // As a crash between the two renames leaves it.
    fs::rename(&layout.key, layout.key_draft()).unwrap();
    fs::write(&layout.key, old_key).unwrap();
    fs::set_permissions(&layout.key, fs::Permissions::from_mode(0o600)).unwrap();
    Credentials::load(dir.path(), Kind::Node).unwrap();
    assert!(!layout.key_draft().exists());
    Credentials::load(dir.path(), Kind::Node).unwrap();
}

#[test]
fn an_authority_signs_for_keys_only() {
    let ours = authority(CLUSTER);
    let first = node(CLUSTER, 1);
    let sign = |request: &str| ours.sign(&first, request, NODE_LIFETIME, now());
    for bad in ["", "nonsense", &"x".repeat(9 << 10)] {
        assert!(matches!(sign(bad), Err(TrustError::Request(_))));
    }
    let pem = SigningRequest::new().unwrap().pem().unwrap();
    let tampered = pem.replacen("MIG", "MIH", 1);
    assert!(tampered == pem || matches!(sign(&tampered), Err(TrustError::Request(_))));
    let weak = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let weak = rcgen::CertificateParams::default().serialize_request(&weak).unwrap();
    assert!(matches!(sign(&weak.pem().unwrap()), Err(TrustError::Request(_))));
    // Names that a request asks for are not given.
    let key = rcgen::KeyPair::generate().unwrap();
    let greedy = rcgen::CertificateParams::new(vec!["node9".to_owned()]).unwrap();
    let signed = sign(&greedy.serialize_request(&key).unwrap().pem().unwrap()).unwrap();
    let ca = ours.pem();
    let known = fingerprint(ours.certificate());
    assert_eq!(check_issued(&signed, ca, (known, "node1"), now()).unwrap(), first);
    check_issued(&signed, ca, (known, "node9"), now()).expect_err("another name");
    let error = check_issued(&signed, ca, ([0; 32], "node1"), now()).unwrap_err();
    assert!(matches!(error, TrustError::Fingerprint));
}

#[test]
fn an_authority_is_read_with_its_own_key_only() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, key) = Authority::create(CLUSTER, "test", now()).unwrap();
    let layout = Layout::of_authority(dir.path());
    layout.write(ours.pem(), &key, ours.pem()).unwrap();
    let loaded = Authority::load(dir.path()).unwrap();
    assert_eq!(loaded.cluster(), CLUSTER);
    // What it signs is believed by those who know the authority from its making.
    let signed = credentials(&loaded, &node(CLUSTER, 1), now());
    assert_eq!(signed.authority(), ours.certificate());
    fs::write(&layout.key, SigningRequest::new().unwrap().key_pem()).unwrap();
    let why = Authority::load(dir.path()).err().unwrap().to_string();
    assert!(why.contains("ca.key: not the key of"), "{why}");
    fs::set_permissions(&layout.key, fs::Permissions::from_mode(0o644)).unwrap();
    let why = Authority::load(dir.path()).err().unwrap().to_string();
    assert!(why.contains("mode 0644"), "{why}");
}
