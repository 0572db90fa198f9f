//! What every backend must do, and what only one with a network and a shared etcd must.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use sds::env::Env;
use sds::meta::etcd::{EtcdOptions, EtcdStore};
use sds::meta::{Condition, MetaError, MetaStore, TXN_OPS_MAX, Txn, TxnOutcome, conformance};

use super::identity::Identity;
use super::support::{Etcd, ctl};
use super::{client, next, options, put, run};

#[test]
fn the_store_conforms() {
    let etcd = Etcd::start(1);
    run(async {
        let count = Cell::new(0);
        let fresh = || async {
            count.set(count.get() + 1);
            let prefix = format!("/check{}", count.get());
            let options = EtcdOptions { prefix, ..options(&etcd) };
            let store = EtcdStore::new(&options, Env::from_seed(1)).expect("good options");
            Rc::new(store) as Rc<dyn MetaStore>
        };
        // etcd knows no shorter lease than one and a half times its time-out of elections.
        conformance::run(fresh, Duration::from_secs(2)).await;
    });
}

#[test]
fn the_store_conforms_on_three_members() {
    let etcd = Etcd::start(3);
    run(async {
        let count = Cell::new(0);
        let fresh = || async {
            count.set(count.get() + 1);
            let prefix = format!("/check{}", count.get());
            let options = EtcdOptions { prefix, ..options(&etcd) };
            let store = EtcdStore::new(&options, Env::from_seed(count.get())).expect("good");
            Rc::new(store) as Rc<dyn MetaStore>
        };
        conformance::run(fresh, Duration::from_secs(2)).await;
    });
}

#[test]
fn two_clusters_share_an_etcd() {
    let etcd = Etcd::start(1);
    run(async {
        let store = |prefix: &str| {
            let options = EtcdOptions { prefix: prefix.into(), ..options(&etcd) };
            EtcdStore::new(&options, Env::from_seed(1)).expect("good options")
        };
        let (east, west) = (store("/east"), store("/west"));
        let mut watch = west.watch("", 0).await.expect("it works");
        put(&east, "/sds/a", "east").await;
        let revision = put(&west, "/sds/b", "west").await;
        assert_eq!(west.get("/sds/a").await, Ok(None));
        let empty = Txn::new().when(Condition::PrefixEmpty("/sds/a".into()));
        assert!(west.txn(empty).await.expect("it works").committed().is_some());
        let keys = west.list("").await.expect("it works").entries;
        assert_eq!(keys.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["/sds/b"]);
        assert_eq!(next(&mut watch).await, Ok((revision, vec!["/sds/b".into()])));
        assert_eq!(etcd.ctl(0, &["get", "/west/sds/b", "--print-value-only"]), "west\n");
    });
}

#[test]
fn a_long_list_shows_one_revision() {
    let etcd = Etcd::start(1);
    run(async {
        let store = client(&etcd);
        for batch in 0..24 {
            let keys = 0..TXN_OPS_MAX;
            let txn = keys.fold(Txn::new(), |txn, key| {
                txn.put(format!("/l/{batch:02}{key:03}"), "old".repeat(10))
            });
            store.txn(txn).await.expect("it works");
        }
        for index in 0..70 {
            put(&store, &format!("/l/zz{index:02}"), "x".repeat(1_000_000)).await;
        }
        // First and last key always change together.
        let change = async |round: u32| {
            let txn = Txn::new().put("/l/00000", round.to_string());
            store.txn(txn.put("/l/zz99", round.to_string())).await.expect("it works");
        };
        change(0).await;
        let list = async {
            for _ in 0..3 {
                let listing = store.list("/l/").await.expect("it works");
                assert_eq!(listing.entries.len(), 24 * TXN_OPS_MAX + 71);
                assert!(listing.entries.windows(2).all(|pair| pair[0].0 < pair[1].0));
                let (first, last) =
                    (&listing.entries[0].1, &listing.entries.last().expect("one").1);
                assert_eq!(first, last, "one revision");
                assert!(listing.revision >= last.revision);
            }
        };
        let write = async {
            for round in 1.. {
                change(round).await;
            }
        };
        tokio::select! {
            biased;
            () = list => {}
            () = write => {}
        }
    });
}

#[test]
fn tls_and_a_password() {
    let dir = tempfile::tempdir().expect("a directory");
    let identity = Identity::new();
    let [certificate, key, authority] = identity.write_server(dir.path());
    let clients = dir.path().join("clients");
    std::fs::create_dir(&clients).expect("a directory");
    identity.write(&clients);
    let (client_certificate, client_key) =
        (clients.join("client-cert.pem"), clients.join("client-key.pem"));
    let etcd = Etcd::start_with(1, Some(&[certificate, key, authority.clone()]));
    let address = etcd.urls()[0].clone();
    let [ca, certificate, key] =
        [&authority, &client_certificate, &client_key].map(|path| path.display().to_string());
    let admin = |args: &[&str]| {
        let tls = ["--cacert", &*ca, "--cert", &*certificate, "--key", &*key];
        ctl(&address, &[&tls, args].concat())
    };
    admin(&["user", "add", "root:secret"]);
    admin(&["user", "grant-role", "root", "root"]);
    admin(&["user", "add", "sds:word"]);
    admin(&["role", "add", "sds"]);
    admin(&["role", "grant-permission", "sds", "--prefix=true", "readwrite", "/sds/"]);
    admin(&["user", "grant-role", "sds", "sds"]);
    admin(&["auth", "enable"]);
    let password = dir.path().join("password");
    std::fs::write(&password, "word\n").expect("a file");
    let good = EtcdOptions {
        endpoints: vec![address.clone()],
        authority: Some(authority),
        identity: Some((client_certificate, client_key)),
        user: Some(("sds".into(), password.clone())),
        ..EtcdOptions::default()
    };
    run(async {
        let store = |options: &EtcdOptions| EtcdStore::new(options, Env::from_seed(1)).expect("ok");
        let let_in = store(&good);
        put(&let_in, "/sds/a", 1).await;
        let mut watch = let_in.watch("/sds/", 0).await.expect("it works");
        let revision = put(&let_in, "/sds/a", 2).await;
        assert_eq!(next(&mut watch).await, Ok((revision, vec!["/sds/a".into()])));

        // What is not allowed was not done.
        let foreign = let_in.txn(Txn::new().put("/other", "x")).await;
        assert!(
            matches!(&foreign, Err(MetaError::Unavailable(why)) if why.contains("permission denied")),
            "{foreign:?}"
        );
        std::fs::write(&password, "wrong").expect("a file");
        let refused = store(&good).get("/sds/a").await;
        assert!(
            matches!(&refused, Err(MetaError::Unavailable(why)) if why.contains("invalid user")),
            "{refused:?}"
        );
        let anonymous = EtcdOptions { user: None, ..good.clone() };
        let refused = store(&anonymous).get("/sds/a").await;
        assert!(
            matches!(&refused, Err(MetaError::Unavailable(why)) if why.contains("permission denied")),
            "{refused:?}"
        );
        let stranger = EtcdOptions { identity: None, user: None, ..good.clone() };
        let refused = store(&stranger).get("/sds/a").await;
        assert!(matches!(refused, Err(MetaError::Unavailable(_))), "{refused:?}");
        let plain = EtcdOptions {
            endpoints: vec![address.replace("https", "http")],
            ..EtcdOptions::default()
        };
        let refused = store(&plain).txn(Txn::new().put("/sds/a", "x")).await;
        assert!(matches!(refused, Err(MetaError::Unavailable(_))), "{refused:?}");
    });
}

#[test]
fn a_transaction_without_changes_is_of_now() {
    let etcd = Etcd::start(3);
    run(async {
        let writer = client(&etcd);
        let readers: Vec<EtcdStore> = (0..6)
            .map(|seed| EtcdStore::new(&options(&etcd), Env::from_seed(seed)).expect("good"))
            .collect();
        for round in 0..100 {
            let revision = put(&writer, "/a", round).await;
            for reader in &readers {
                let now = Txn::new().when(Condition::KeyAt("/a".into(), revision));
                let outcome = reader.txn(now).await;
                assert_eq!(outcome, Ok(TxnOutcome::Committed { revision }), "of the past");
            }
        }
    });
}
