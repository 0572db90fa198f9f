//! Starts `sdsd`, runs tools, talks NBD.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// How long a node may take to start.
const START_PATIENCE: Duration = Duration::from_mins(1);

/// A directory for disks, on memory if there is any.
pub(crate) fn directory() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    let base = if shm.is_dir() { shm } else { Path::new(env!("CARGO_TARGET_TMPDIR")) };
    tempfile::Builder::new().prefix("sds-e2e-").tempdir_in(base).expect("a directory for disks")
}

/// A running `sdsd`. Killed when dropped.
pub(crate) struct Node {
    child: Child,
    pub dir: PathBuf,
    /// Address of NBD.
    pub nbd: String,
    /// URI of the volume.
    pub uri: String,
    admin: String,
}

/// Arguments for a node of six small disks.
pub(crate) const SMALL: [&str; 4] = ["--disk-size", "512M", "--volume", "vol0:256M"];

fn sdsd(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sdsd"));
    command.args(["dev", "--nbd", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--dir"]);
    command.arg(dir).args(args);
    command
}

/// Lines of a stream of the node, read to its end so that the node never writes into a closed pipe.
fn lines_of(stream: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::Builder::new()
        .spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                sender.send(line).ok();
            }
        })
        .expect("a thread");
    lines
}

impl Node {
    /// Starts a node in `dir` and waits until it says where it is.
    pub(crate) fn start(dir: &Path, args: &[&str]) -> Self {
        Self::launch(dir, sdsd(dir, args))
    }

    /// Starts a node whose soft limit of open files is `files`.
    pub(crate) fn start_with_limit(dir: &Path, files: u32, args: &[&str]) -> Self {
        let inner = sdsd(dir, args);
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -Sn {files} && exec \"$0\" \"$@\"")]);
        command.arg(inner.get_program()).args(inner.get_args());
        Self::launch(dir, command)
    }

    fn launch(dir: &Path, mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("sdsd starts");
        let lines = lines_of(child.stdout.take().expect("piped"));
        let mut find = |prefix: &str| loop {
            let line = lines.recv_timeout(START_PATIENCE).unwrap_or_else(|_| {
                child.kill().ok();
                panic!("sdsd did not say '{prefix}'");
            });
            if let Some(rest) = line.trim().strip_prefix(prefix) {
                return rest.trim().to_owned();
            }
        };
        let uri = find("volume");
        let admin = find("admin");
        find("try:");
        let nbd = uri.trim_start_matches("nbd://").split('/').next().expect("a host").to_owned();
        Self { child, dir: dir.to_owned(), nbd, uri, admin }
    }

    /// Starts the node that a configuration describes, and waits until it logs that it is ready;
    /// `volume` is what its URI is to name.
    pub(crate) fn start_configured(config: &Path, volume: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sdsd"));
        let mut child = command
            .arg("--config")
            .arg(config)
            .stderr(Stdio::piped())
            .spawn()
            .expect("sdsd starts");
        let lines = lines_of(child.stderr.take().expect("piped"));
        let mut said = String::new();
        let (nbd, admin) = loop {
            let line = lines.recv_timeout(START_PATIENCE).unwrap_or_else(|_| {
                child.kill().ok();
                panic!("sdsd is not ready: {said}");
            });
            let found = line.split_once("ready nbd=[").and_then(|(_, rest)| {
                let (nbd, rest) = rest.split_once(']')?;
                Some((nbd.to_owned(), rest.split_once("admin=")?.1.to_owned()))
            });
            if let Some(found) = found {
                break found;
            }
            said += &(line + "\n");
        };
        let dir = config.parent().expect("a directory").to_owned();
        let uri = format!("nbd://{nbd}/{volume}");
        Self { child, dir, nbd, uri, admin }
    }

    /// What a node says that is not to start: it must fail.
    pub(crate) fn refused(dir: &Path, args: &[&str]) -> String {
        let output = sdsd(dir, args).output().expect("sdsd starts");
        assert!(!output.status.success(), "sdsd dev {args:?} started");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Runs `sdsctl`; its output, and whether it succeeded.
    pub(crate) fn ctl_raw(&self, args: &[&str]) -> (bool, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_sdsctl"))
            .args(["--endpoint", &self.admin])
            .args(args)
            .output()
            .expect("sdsctl starts");
        (output.status.success(), text(&output))
    }

    /// Runs `sdsctl`; its exit code, and what it says on standard output and standard error.
    pub(crate) fn ctl_code(&self, args: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_sdsctl"))
            .args(["--endpoint", &self.admin])
            .args(args)
            .output()
            .expect("sdsctl starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    /// Runs `sdsctl`, which must succeed.
    pub(crate) fn ctl(&self, args: &[&str]) -> String {
        let (ok, text) = self.ctl_raw(args);
        assert!(ok, "sdsctl {args:?}: {text}");
        text
    }

    /// Runs `sdsctl … -o json`.
    pub(crate) fn json(&self, args: &[&str]) -> serde_json::Value {
        let text = self.ctl(&[args, &["-o", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|why| panic!("{args:?}: {why}: {text}"))
    }

    /// Waits until a value of `sdsctl … -o json` is as wanted.
    pub(crate) fn wait_json(
        &self,
        what: &str,
        args: &[&str],
        wanted: impl Fn(&serde_json::Value) -> bool,
    ) {
        for _ in 0..240 {
            if wanted(&self.json(args)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        panic!("{what}: {:#}\n{}", self.json(args), self.ctl(&["status"]));
    }

    /// Stops in order.
    pub(crate) fn stop(mut self) {
        // The shell has it built in; the program is in a package that not every machine has.
        run("sh", &["-c", &format!("kill -TERM {}", self.child.id())]);
        let status = self.child.wait().expect("sdsd ends");
        assert!(status.success(), "sdsd ended with {status}");
    }

    /// Kills without notice.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it ends");
    }

    /// Path of a disk's file.
    pub(crate) fn disk(&self, index: usize) -> PathBuf {
        self.dir.join(format!("disk{index}.img"))
    }

    /// Id of the disk at a path.
    pub(crate) fn disk_id(&self, index: usize) -> String {
        let path = self.disk(index).display().to_string();
        let disks = self.json(&["disk", "ls"]);
        let disk = disks.as_array().expect("a list").iter().find(|d| d["path"] == path.as_str());
        disk.expect("the disk is listed")["id"].as_str().expect("text").to_owned()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn text(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text += &String::from_utf8_lossy(&output.stderr);
    text
}

/// Starts a tool; fails with advice if it is not installed.
pub(crate) fn spawn(tool: &str, args: &[&str]) -> Child {
    Command::new(tool)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|why| {
            panic!("{tool}: {why}: tools/test installs qemu-utils, libnbd-bin and fio")
        })
}

/// Runs a tool, which must fail; its output.
pub(crate) fn fails(tool: &str, args: &[&str]) -> String {
    let output = spawn(tool, args).wait_with_output().expect("it ends");
    let text = text(&output);
    assert!(!output.status.success(), "{tool} {args:?} succeeded: {text}");
    text
}

/// Waits for a tool, which must succeed; its output.
pub(crate) fn finish(tool: &str, child: Child) -> String {
    let output = child.wait_with_output().expect("it ends");
    let text = text(&output);
    assert!(output.status.success(), "{tool} failed with {}: {text}", output.status);
    text
}

/// Runs a tool, which must succeed; its output.
pub(crate) fn run(tool: &str, args: &[&str]) -> String {
    finish(tool, spawn(tool, args))
}

/// Pseudo-random bytes.
pub(crate) struct Noise(pub u64);

impl Noise {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 8) % bound
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}

/// A plain NBD client: one request at a time.
pub(crate) struct Client {
    pub stream: TcpStream,
    handle: u64,
}

impl Client {
    /// Attaches an export.
    pub(crate) fn attach(address: &str, export: &str) -> std::io::Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend_from_slice(b"IHAVEOPT");
        hello.extend_from_slice(&1_u32.to_be_bytes());
        hello.extend_from_slice(&u32::try_from(export.len()).expect("short").to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        stream.write_all(&hello)?;
        stream.read_exact(&mut [0; 10])?;
        Ok(Self { stream, handle: 0 })
    }

    fn request(&mut self, kind: u16, offset: u64, len: usize, data: &[u8]) -> std::io::Result<u32> {
        self.handle += 1;
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend_from_slice(&0_u16.to_be_bytes());
        request.extend_from_slice(&kind.to_be_bytes());
        request.extend_from_slice(&self.handle.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&u32::try_from(len).expect("small").to_be_bytes());
        request.extend_from_slice(data);
        self.stream.write_all(&request)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes(), "a simple reply");
        assert_eq!(reply[8..], self.handle.to_be_bytes(), "to this request");
        Ok(u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]]))
    }

    /// Writes; the error number of the reply, 0 for success.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> std::io::Result<u32> {
        self.request(1, offset, data.len(), data)
    }

    /// Reads something that is refused; the error number of the reply.
    pub(crate) fn read_refused(&mut self, offset: u64, len: usize) -> std::io::Result<u32> {
        self.request(0, offset, len, &[])
    }

    /// Reads; must succeed.
    pub(crate) fn read(&mut self, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let errno = self.request(0, offset, len, &[])?;
        assert_eq!(errno, 0, "reading {len} bytes at {offset}");
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }
}
