//! Requests in the terms of etcd.

use std::rc::Rc;

use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, TxnOp};

use crate::meta::{Condition, LeaseId, MetaError, MetaResult, Op, Txn};

/// The keys of a store within those of an etcd.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    prefix: Rc<str>,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.into() }
    }

    /// A key as etcd has it.
    pub(super) fn key(&self, key: &str) -> Vec<u8> {
        [self.prefix.as_bytes(), key.as_bytes()].concat()
    }

    /// First key with a prefix, and the first after all of them. etcd takes a NUL for "from the
    /// first" and for "to the last".
    pub(super) fn range(&self, prefix: &str) -> (Vec<u8>, Vec<u8>) {
        let begin = self.key(prefix);
        let mut end = begin.clone();
        match end.last_mut() {
            // UTF-8 has no byte 0xff.
            Some(last) => *last += 1,
            None => return (vec![0], vec![0]),
        }
        (begin, end)
    }

    /// A key of etcd's as the store has it; none if it is not one of the store's.
    pub(super) fn strip(&self, key: &[u8]) -> Option<String> {
        let key = key.strip_prefix(self.prefix.as_bytes())?;
        String::from_utf8(key.to_vec()).ok()
    }

    fn condition(&self, condition: &Condition) -> MetaResult<Compare> {
        Ok(match condition {
            Condition::KeyMissing(key) => {
                Compare::create_revision(self.key(key), CompareOp::Equal, 0)
            }
            Condition::KeyExists(key) => {
                Compare::create_revision(self.key(key), CompareOp::Greater, 0)
            }
            Condition::KeyAt(key, revision) => {
                let revision = i64::try_from(*revision)
                    .map_err(|_| MetaError::Invalid(format!("revision {revision} of {key}")))?;
                Compare::mod_revision(self.key(key), CompareOp::Equal, revision)
            }
            Condition::PrefixEmpty(prefix) => {
                // Of an empty range etcd compares a key that does not exist.
                let (begin, end) = self.range(prefix);
                Compare::create_revision(begin, CompareOp::Equal, 0).with_range(end)
            }
        })
    }

    fn op(&self, op: &Op) -> MetaResult<TxnOp> {
        Ok(match op {
            Op::Put { key, value, lease } => {
                let lease = lease.map(lease_id).transpose()?;
                let options = lease.map(|lease| PutOptions::new().with_lease(lease));
                TxnOp::put(self.key(key), value.to_vec(), options)
            }
            Op::Delete(key) => TxnOp::delete(self.key(key), None),
        })
    }

    /// A transaction, which must be within all bounds.
    ///
    /// # Errors
    /// [`MetaError::Invalid`], [`MetaError::LeaseNotFound`]: no etcd counts so far.
    pub(super) fn txn(&self, txn: &Txn) -> MetaResult<etcd_client::Txn> {
        let conditions: MetaResult<Vec<Compare>> =
            txn.conditions.iter().map(|condition| self.condition(condition)).collect();
        let ops: MetaResult<Vec<TxnOp>> = txn.ops.iter().map(|op| self.op(op)).collect();
        let (conditions, mut ops) = (conditions?, ops?);
        let mut otherwise = Vec::new();
        if ops.is_empty() {
            // One without any operation is answered by the member alone, perhaps from the past.
            let read = || {
                let options = GetOptions::new().with_count_only();
                TxnOp::get(self.key(super::CLUSTER_KEY), Some(options))
            };
            ops.push(read());
            otherwise.push(read());
        }
        Ok(etcd_client::Txn::new().when(conditions).and_then(ops).or_else(otherwise))
    }
}

/// A lease as etcd counts them.
///
/// # Errors
/// [`MetaError::LeaseNotFound`]: it is not one of etcd's.
pub(super) fn lease_id(lease: LeaseId) -> MetaResult<i64> {
    i64::try_from(lease.0).map_err(|_| MetaError::LeaseNotFound(lease))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_ranges() {
        let keys = Keys::new("/east");
        assert_eq!(keys.key("/sds/cluster"), b"/east/sds/cluster");
        assert_eq!(keys.range("/sds/"), (b"/east/sds/".to_vec(), b"/east/sds0".to_vec()));
        assert_eq!(keys.strip(b"/east/sds/a"), Some("/sds/a".into()));
        assert_eq!(keys.strip(b"/west/sds/a"), None);
        assert_eq!(keys.strip(b"/east\xff"), None);
        let keys = Keys::new("");
        assert_eq!(keys.range(""), (vec![0], vec![0]));
        let (begin, end) = keys.range("/\u{10ffff}");
        let within = "/\u{10ffff}x".as_bytes();
        assert!(within > &*begin && within < &*end);
    }
}
