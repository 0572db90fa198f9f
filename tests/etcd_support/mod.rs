//! A real etcd of one or three members on loopback: started, killed, paused, compacted, restored.
//!
//! Needs Debian's etcd-server and etcd-client (`tools/setup` installs them); where they are
//! missing, tests fail and say so. Data lies in a directory that goes away with it.

#![allow(
    dead_code,
    clippy::print_stderr,
    reason = "each test binary uses its part, and failures are told"
)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a member may take to serve.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How often other ports are tried, should somebody take one meanwhile.
const START_TRIES: usize = 5;

/// One member.
struct Member {
    name: String,
    client_port: u16,
    peer_port: u16,
    child: Option<Child>,
}

/// An etcd. Killed when dropped.
pub(crate) struct Etcd {
    dir: tempfile::TempDir,
    members: Vec<Member>,
    token: String,
    /// Certificate, key and authority of the members, where clients come by TLS.
    tls: Option<[PathBuf; 3]>,
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

/// Runs `etcdctl`, which must succeed; its output.
fn etcdctl(args: &[&str]) -> String {
    let output = Command::new("etcdctl").env("ETCDCTL_API", "3").args(args).output();
    let output = output
        .unwrap_or_else(|why| panic!("etcdctl: {why}: tools/setup installs Debian's etcd-client"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "etcdctl {args:?}: {text}{said}");
    text
}

/// Whether a member without TLS answers, and knows of a leader.
fn is_healthy(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    let patience = Some(Duration::from_secs(2));
    let mut answer = String::new();
    stream.set_read_timeout(patience).is_ok()
        && stream.write_all(b"GET /health HTTP/1.0\r\n\r\n").is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.contains("\"true\"")
}

fn signal(child: &Child, name: &str) {
    // The shell has it built in; the program is in a package that not every machine has.
    let command = format!("kill -{name} {}", child.id());
    let status = Command::new("sh").args(["-c", &command]).status().expect("a shell");
    assert!(status.success(), "{command}");
}

/// Whether every thread of a process is stopped: a signal takes a moment on a machine that is busy.
fn is_stopped(child: &Child) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).expect("it runs");
    tasks.flatten().all(|task| {
        // One that has just ended is not in the way.
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('T'))
    })
}

impl Etcd {
    /// Starts an etcd of so many members and waits until all serve.
    pub(crate) fn start(members: usize) -> Self {
        Self::start_with(members, None)
    }

    /// The same with TLS: certificate, key and the authority of clients, PEM files.
    pub(crate) fn start_with(members: usize, tls: Option<&[PathBuf; 3]>) -> Self {
        for _ in 0..START_TRIES {
            let shm = Path::new("/dev/shm");
            let base = if shm.is_dir() { shm } else { Path::new(env!("CARGO_TARGET_TMPDIR")) };
            let dir = tempfile::Builder::new().prefix("sds-etcd-").tempdir_in(base);
            let member = |index| Member {
                name: format!("m{index}"),
                client_port: free_port(),
                peer_port: free_port(),
                child: None,
            };
            let mut etcd = Self {
                dir: dir.expect("a directory for etcd"),
                members: (0..members).map(member).collect(),
                token: "first".into(),
                tls: tls.cloned(),
            };
            for index in 0..members {
                etcd.launch(index, etcd.members[index].client_port);
            }
            if (0..members).all(|index| etcd.wait_for(index)) {
                return etcd;
            }
        }
        panic!("no etcd starts");
    }

    fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    fn data(&self, index: usize) -> PathBuf {
        self.dir.path().join(&self.members[index].name)
    }

    /// The members as etcd wants them named.
    fn cluster(&self) -> String {
        let one = |m: &Member| format!("{}=http://127.0.0.1:{}", m.name, m.peer_port);
        self.members.iter().map(one).collect::<Vec<_>>().join(",")
    }

    fn launch(&mut self, index: usize, client_port: u16) {
        let member = &self.members[index];
        let client = format!("{}://127.0.0.1:{client_port}", self.scheme());
        let peer = format!("http://127.0.0.1:{}", member.peer_port);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join(format!("{}.log", member.name)))
            .expect("a log");
        let mut command = Command::new("etcd");
        command
            .args(["--name", &member.name, "--logger", "zap", "--log-level", "error"])
            .arg("--data-dir")
            .arg(self.data(index))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.cluster(), "--initial-cluster-state", "new"])
            .args(["--initial-cluster-token", &self.token]);
        if let Some([certificate, key, authority]) = &self.tls {
            command.arg("--cert-file").arg(certificate).arg("--key-file").arg(key);
            command.arg("--trusted-ca-file").arg(authority).arg("--client-cert-auth");
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        let child = child
            .unwrap_or_else(|why| panic!("etcd: {why}: tools/setup installs Debian's etcd-server"));
        self.members[index].child = Some(child);
    }

    /// Whether the member serves in time.
    fn wait_for(&mut self, index: usize) -> bool {
        self.wait_for_port(index, self.members[index].client_port)
    }

    fn wait_for_port(&mut self, index: usize, port: u16) -> bool {
        let start = Instant::now();
        while start.elapsed() < START_PATIENCE {
            // Its socket is open long before it serves.
            if self.tls.is_some() && TcpStream::connect(("127.0.0.1", port)).is_ok()
                || is_healthy(port)
            {
                return true;
            }
            let child = self.members[index].child.as_mut().expect("it was started");
            if child.try_wait().expect("a child").is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// URLs of all members.
    pub(crate) fn urls(&self) -> Vec<String> {
        let url = |m: &Member| format!("{}://127.0.0.1:{}", self.scheme(), m.client_port);
        self.members.iter().map(url).collect()
    }

    fn child(&self, index: usize) -> &Child {
        self.members[index].child.as_ref().expect("the member runs")
    }

    /// Kills a member without notice.
    pub(crate) fn kill(&mut self, index: usize) {
        let mut child = self.members[index].child.take().expect("the member runs");
        child.kill().expect("it runs");
        child.wait().expect("it ends");
    }

    /// Stops a member in order.
    pub(crate) fn stop(&mut self, index: usize) {
        let mut child = self.members[index].child.take().expect("the member runs");
        signal(&child, "TERM");
        child.wait().expect("it ends");
    }

    /// Starts a member that was killed or stopped, and waits until it serves.
    pub(crate) fn restart(&mut self, index: usize) {
        for _ in 0..START_TRIES {
            self.launch(index, self.members[index].client_port);
            if self.wait_for(index) {
                return;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        panic!("the member does not start again");
    }

    /// Starts the only member, which was stopped, where no client looks for it, does something and
    /// stops it again.
    pub(crate) fn unseen(&mut self, act: impl FnOnce(&str)) {
        let port = free_port();
        self.launch(0, port);
        assert!(self.wait_for_port(0, port), "the member starts");
        act(&format!("127.0.0.1:{port}"));
        self.stop(0);
    }

    /// Stops the process of a member as a debugger does: it neither answers nor hangs up.
    pub(crate) fn pause(&self, index: usize) {
        signal(self.child(index), "STOP");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_stopped(self.child(index)) {
            assert!(Instant::now() < deadline, "the member does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets a paused member go on.
    pub(crate) fn resume(&self, index: usize) {
        signal(self.child(index), "CONT");
    }

    /// Runs `etcdctl` against a running member.
    pub(crate) fn ctl(&self, index: usize, args: &[&str]) -> String {
        ctl(&format!("127.0.0.1:{}", self.members[index].client_port), args)
    }

    /// Saves the content of the only member to a file.
    pub(crate) fn snapshot(&self) -> PathBuf {
        let path = self.dir.path().join("snapshot");
        self.ctl(0, &["snapshot", "save", path.to_str().expect("UTF-8")]);
        path
    }

    /// Puts an older content back into the only member, which was stopped, and starts it. With a
    /// new token, which is what etcd's manual advises, it is another cluster.
    pub(crate) fn restore(&mut self, snapshot: &Path, token: Option<&str>) {
        self.token = token.unwrap_or(&self.token).to_owned();
        let data = self.data(0);
        std::fs::remove_dir_all(&data).expect("the old content");
        let peer = format!("http://127.0.0.1:{}", self.members[0].peer_port);
        etcdctl(&[
            "snapshot",
            "restore",
            snapshot.to_str().expect("UTF-8"),
            "--name",
            "m0",
            "--data-dir",
            data.to_str().expect("UTF-8"),
            "--initial-cluster",
            &self.cluster(),
            "--initial-cluster-token",
            &self.token,
            "--initial-advertise-peer-urls",
            &peer,
        ]);
        self.restart(0);
    }
}

/// Runs `etcdctl` against an address; its output.
pub(crate) fn ctl(address: &str, args: &[&str]) -> String {
    etcdctl(&[&["--endpoints", address], args].concat())
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            if let Some(child) = &mut member.child {
                child.kill().ok();
                child.wait().ok();
            }
        }
        if std::thread::panicking() {
            for member in &self.members {
                let log = self.dir.path().join(format!("{}.log", member.name));
                let text = std::fs::read_to_string(log).unwrap_or_default();
                let last: Vec<&str> = text.lines().rev().take(5).collect();
                for line in last.iter().rev() {
                    eprintln!("{}: {line}", member.name);
                }
            }
        }
    }
}
