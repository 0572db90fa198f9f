//! `sdsctl cluster …`: the authority of a cluster and what it signs, in files; no node is asked.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::output::Output;
use super::{Failure, parse};
use crate::env::Env;
use crate::id::{ClusterId, NodeId};
use crate::trust::files::{ADMIN_DIR, AUTHORITY_DIR, NODE_DIR};
use crate::trust::token::hex;
use crate::trust::{
    self, ADMIN_LIFETIME, Authority, Holder, Kind, Layout, NODE_LIFETIME, Role, SigningRequest,
    TrustError,
};

/// Verbs on the authority of a cluster.
#[derive(Debug, Subcommand)]
pub(super) enum ClusterVerb {
    /// Makes the authority of a new cluster, the first operator's and the first node's credentials
    #[command(after_help = "\
Makes, in DIR:
  authority/  ca.pem ca.key                 signs; whoever has ca.key can become anybody
  admin/      ca.pem admin.pem admin.key    for sdsctl --credentials DIR/admin
  node/       ca.pem node.pem node.key      for `credentials` in [cluster] of the node's configuration

Example:
  sdsctl cluster init --dir /etc/sds --name east --node node0")]
    Init(Init),
    /// Signs credentials for one more operator, or a node, where the authority's key lies
    #[command(
        after_help = "Examples:\n  sdsctl cluster issue --authority /etc/sds/authority --admin \
                            eve --dir eve\n  sdsctl cluster issue --authority /etc/sds/authority --node \
                            node7 --dir node7"
    )]
    Issue(Issue),
}

/// What `init` is told.
#[derive(Debug, Args)]
pub(super) struct Init {
    /// Directory to make it all in
    #[arg(long)]
    dir: PathBuf,
    /// Name of the cluster, for people
    #[arg(long, value_parser = parse::cluster_name)]
    name: String,
    /// Name of the first node, as `node` of its configuration says
    #[arg(long, default_value = "node0", value_parser = parse::node_name)]
    node: String,
    /// Name of the first operator
    #[arg(long, default_value = "admin", value_parser = parse::admin_name)]
    admin: String,
    /// Id of a cluster that there is already; a new one if it is left out
    #[arg(long, value_name = "ID")]
    id: Option<ClusterId>,
}

/// What `issue` is told.
#[derive(Debug, Args)]
pub(super) struct Issue {
    /// Directory of the authority: ca.pem and ca.key
    #[arg(long, value_name = "DIR")]
    authority: PathBuf,
    /// Directory to make the credentials in
    #[arg(long)]
    dir: PathBuf,
    #[command(flatten)]
    whom: Whom,
    /// Keeps the id that a node has had
    #[arg(long, value_name = "ID", requires = "node")]
    node_id: Option<NodeId>,
}

/// For whom.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Whom {
    /// Name of an operator
    #[arg(long, value_name = "NAME", value_parser = parse::admin_name)]
    admin: Option<String>,
    /// Name of a node
    #[arg(long, value_name = "NAME", value_parser = parse::node_name)]
    node: Option<String>,
}

/// What was made, for programs.
#[derive(Debug, Serialize)]
struct Made {
    cluster: ClusterId,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<NodeId>,
    fingerprint: String,
    directories: Vec<PathBuf>,
}

/// Runs the verb.
pub(super) fn run(verb: &ClusterVerb, out: &mut Output) -> Result<(), Failure> {
    match verb {
        ClusterVerb::Init(args) => init(args, out),
        ClusterVerb::Issue(args) => issue(args, out),
    }
}

fn init(args: &Init, out: &mut Output) -> Result<(), Failure> {
    let env = Env::from_entropy();
    let cluster = args.id.unwrap_or_else(|| ClusterId::from_bytes(env.random_bytes()));
    let node = NodeId::from_bytes(env.random_bytes());
    let dir = std::path::absolute(&args.dir)?;
    let dirs = [AUTHORITY_DIR, ADMIN_DIR, NODE_DIR].map(|name| dir.join(name));
    let [authority_dir, admin_dir, node_dir] = &dirs;
    let place = Layout::of_authority(authority_dir);
    place.check_absent()?;
    let layouts = [Layout::of(admin_dir, Kind::Admin), Layout::of(node_dir, Kind::Node)];
    layouts.iter().try_for_each(Layout::check_absent)?;
    let (authority, key) = Authority::create(cluster, &args.name, trust::now())?;
    place.write(authority.pem(), &key, authority.pem())?;
    let [admin_layout, node_layout] = &layouts;
    let admin = Holder { cluster, role: Role::Admin, name: args.admin.clone() };
    write_new(&authority, &admin, admin_layout)?;
    let holder = Holder { cluster, role: Role::Node(node), name: args.node.clone() };
    write_new(&authority, &holder, node_layout)?;
    let fingerprint = hex(&trust::fingerprint(authority.certificate()));
    let made = Made { cluster, node: Some(node), fingerprint, directories: dirs.to_vec() };
    out.show(&made, |made| after_init(made, args, &dir))?;
    Ok(())
}

fn after_init(made: &Made, args: &Init, dir: &Path) -> String {
    format!(
        "cluster {name}: {cluster}\n\
         authority:  {dir}/authority   keep ca.key safe, and a copy elsewhere: it cannot be made again\n\
         operator:   {dir}/admin       sdsctl --credentials {dir}/admin --endpoint https://HOST:9770 status\n\
         node:       {dir}/node        in the configuration of {node}:\n\n\
         node = \"{node}\"\n\n\
         [cluster]\n\
         credentials = \"{dir}/node\"\n\
         authority = \"{dir}/authority\"    # where this node may sign for those that join\n",
        name = args.name,
        cluster = made.cluster,
        dir = dir.display(),
        node = args.node,
    )
}

fn issue(args: &Issue, out: &mut Output) -> Result<(), Failure> {
    let authority = Authority::load(&args.authority)?;
    let cluster = authority.cluster();
    let new = || NodeId::from_bytes(Env::from_entropy().random_bytes());
    let (kind, holder) = match (&args.whom.admin, &args.whom.node) {
        (Some(name), _) => (Kind::Admin, Holder { cluster, role: Role::Admin, name: name.clone() }),
        (None, Some(name)) => {
            let role = Role::Node(args.node_id.unwrap_or_else(new));
            (Kind::Node, Holder { cluster, role, name: name.clone() })
        }
        (None, None) => unreachable!("clap asks for one of them"),
    };
    let layout = Layout::of(&args.dir, kind);
    layout.check_absent()?;
    write_new(&authority, &holder, &layout)?;
    let fingerprint = hex(&trust::fingerprint(authority.certificate()));
    let directories = vec![args.dir.clone()];
    let made = Made { cluster, node: holder.node(), fingerprint, directories };
    out.show(&made, |_| format!("credentials of {holder} in {}\n", args.dir.display()))?;
    Ok(())
}

/// Makes a key and a certificate, and writes both.
fn write_new(authority: &Authority, holder: &Holder, layout: &Layout) -> Result<(), TrustError> {
    let request = SigningRequest::new()?;
    let lifetime = if holder.node().is_some() { NODE_LIFETIME } else { ADMIN_LIFETIME };
    let certificate = authority.sign(holder, &request.pem()?, lifetime, trust::now())?;
    layout.write(&certificate, &request.key_pem(), authority.pem())
}
