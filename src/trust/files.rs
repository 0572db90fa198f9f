//! Credentials as files: names, modes, and how they are replaced.
//!
//! ```text
//!  DIR/authority/  ca.pem ca.key                  made by `sdsctl cluster init`; only where joins are signed
//!  DIR/admin/      ca.pem admin.pem admin.key     an operator's
//!  DIR/node/       ca.pem node.pem node.key       the node's, also made by `sdsd join`
//! ```
//!
//! A file is written beside its place, synced, then renamed. Of a certificate and its key the certificate
//! is renamed first; a crash between the two leaves the new key beside the old one, and
//! [`finish_replacing`] puts it in place.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::TrustError;

/// Largest file of credentials, bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Directory of the authority below that of `sdsctl cluster init`.
pub const AUTHORITY_DIR: &str = "authority";
/// Directory of the first operator below that of `sdsctl cluster init`.
pub const ADMIN_DIR: &str = "admin";
/// Directory of the first node below that of `sdsctl cluster init`.
pub const NODE_DIR: &str = "node";

/// Whose credentials a directory holds; fixes the names of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A node's.
    Node,
    /// An operator's.
    Admin,
}

/// The three files of one holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Certificate, PEM.
    pub certificate: PathBuf,
    /// Private key, PKCS #8 PEM.
    pub key: PathBuf,
    /// The cluster's authority, PEM.
    pub ca: PathBuf,
}

impl Layout {
    /// The files in a directory.
    pub fn of(dir: &Path, kind: Kind) -> Self {
        let stem = match kind {
            Kind::Node => "node",
            Kind::Admin => "admin",
        };
        Self {
            certificate: dir.join(format!("{stem}.pem")),
            key: dir.join(format!("{stem}.key")),
            ca: dir.join("ca.pem"),
        }
    }

    /// The files of an authority in a directory: its certificate is the authority's.
    pub fn of_authority(dir: &Path) -> Self {
        let ca = dir.join("ca.pem");
        Self { certificate: ca.clone(), key: dir.join("ca.key"), ca }
    }

    /// That none of the files is there.
    ///
    /// # Errors
    /// [`TrustError::File`] names the first that is.
    pub fn check_absent(&self) -> Result<(), TrustError> {
        for path in [&self.certificate, &self.key, &self.ca] {
            if fs::symlink_metadata(path).is_ok() {
                return fail(path, "it is there already, and is not overwritten");
            }
        }
        Ok(())
    }

    /// Makes the directory, with mode 0700, and sees that a file can be written there.
    ///
    /// # Errors
    /// [`TrustError::File`].
    pub fn prepare(&self) -> Result<(), TrustError> {
        make_dir(self.key.parent().unwrap_or(Path::new(".")))?;
        let draft = write_draft(&self.key, b"", 0o600)?;
        fs::remove_file(&draft).or_else(|why| fail(&draft, why))
    }

    /// Puts a certificate and its key in place, both PEM, and the authority's certificate if it is not
    /// there. Makes the directory with mode 0700.
    ///
    /// # Errors
    /// [`TrustError::File`].
    pub fn write(&self, certificate: &str, key: &str, ca: &str) -> Result<(), TrustError> {
        let dir = self.key.parent().unwrap_or(Path::new("."));
        make_dir(dir)?;
        if self.ca != self.certificate {
            let draft = write_draft(&self.ca, ca.as_bytes(), 0o644)?;
            rename(&draft, &self.ca)?;
        }
        let key_draft = write_draft(&self.key, key.as_bytes(), 0o600)?;
        let draft = write_draft(&self.certificate, certificate.as_bytes(), 0o644)?;
        sync_dir(dir)?;
        rename(&draft, &self.certificate)?;
        rename(&key_draft, &self.key)?;
        sync_dir(dir)
    }

    /// Where a key lies that is about to take its place.
    pub(super) fn key_draft(&self) -> PathBuf {
        draft_of(&self.key)
    }

    /// Ends a replacement that was cut short.
    pub(super) fn finish_replacing(&self) -> Result<(), TrustError> {
        rename(&self.key_draft(), &self.key)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "errors are handed over as they come")]
pub(super) fn fail<T>(path: &Path, why: impl ToString) -> Result<T, TrustError> {
    Err(TrustError::File { path: path.to_owned(), why: why.to_string() })
}

fn draft_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Makes a directory, which nobody else may look into if it was not there.
pub(super) fn make_dir(dir: &Path) -> Result<(), TrustError> {
    // Those around it are as the user makes directories: other things may be there too.
    let around = dir.parent().map_or(Ok(()), fs::create_dir_all);
    let made = around.and_then(|()| DirBuilder::new().recursive(true).mode(0o700).create(dir));
    made.or_else(|why| fail(dir, why))
}

fn write_draft(path: &Path, content: &[u8], mode: u32) -> Result<PathBuf, TrustError> {
    let draft = draft_of(path);
    let write = || {
        match fs::remove_file(&draft) {
            Err(why) if why.kind() != ErrorKind::NotFound => return Err(why),
            _ => {}
        }
        // A new file: what was there before, or where a link leads, has no say in who may read it.
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().or_else(|why| fail(&draft, why))?;
    Ok(draft)
}

fn rename(draft: &Path, path: &Path) -> Result<(), TrustError> {
    fs::rename(draft, path).or_else(|why| fail(path, why))
}

fn sync_dir(dir: &Path) -> Result<(), TrustError> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir).and_then(|dir| dir.sync_all()).or_else(|why| fail(dir, why))
}

/// Reads a file that anybody may read.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, TrustError> {
    File::open(path).map_err(Some).and_then(take).or_else(|why| told(path, why))
}

/// Reads a private key, which nobody but its owner may read or write.
pub(super) fn read_secret(path: &Path) -> Result<Vec<u8>, TrustError> {
    let file = File::open(path).or_else(|why| fail(path, why))?;
    // Of the open file: what lies at the path may change.
    let mode = file.metadata().or_else(|why| fail(path, why))?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return fail(
            path,
            format!(
                "others than its owner may use this private key (mode {mode:04o}); \
                     if nobody has: chmod 600"
            ),
        );
    }
    take(file).or_else(|why| told(path, why))
}

fn told<T>(path: &Path, why: Option<std::io::Error>) -> Result<T, TrustError> {
    match why {
        Some(why) => fail(path, why),
        None => fail(path, format!("it has more than {FILE_BYTES_MAX} bytes")),
    }
}

/// The content; an error without a reason if it is too large.
fn take(file: File) -> Result<Vec<u8>, Option<std::io::Error>> {
    let mut content = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut content).map_err(Some)?;
    if content.len() as u64 > FILE_BYTES_MAX { Err(None) } else { Ok(content) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn keys_are_their_owners() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::of(&dir.path().join("a/node"), Kind::Node);
        layout.check_absent().unwrap();
        layout.write("certificate", "key", "ca").unwrap();
        assert_eq!((mode(&layout.key), mode(&layout.certificate)), (0o600, 0o644));
        assert_eq!(mode(layout.key.parent().unwrap()), 0o700);
        assert_eq!(read_secret(&layout.key).unwrap(), b"key");
        layout.check_absent().expect_err("it is there");
        fs::set_permissions(&layout.key, fs::Permissions::from_mode(0o640)).unwrap();
        let error = read_secret(&layout.key).unwrap_err().to_string();
        assert!(error.contains("mode 0640") && error.contains("node.key"), "{error}");
        // Replacing it makes it right, and leaves no draft.
        layout.write("new", "new key", "ca").unwrap();
        assert_eq!(
            (read_secret(&layout.key).unwrap(), mode(&layout.key)),
            (b"new key".to_vec(), 0o600)
        );
        assert!(!layout.key_draft().exists());
    }

    #[test]
    fn a_file_without_end_is_refused() {
        let error = read(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
    }
}
