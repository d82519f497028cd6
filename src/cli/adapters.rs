//! `moderatord adapters`: lists and manages the adapter versions in the registry.

use std::io::Write;
use std::time::SystemTime;

use anyhow::bail;
use clap::{Args, Subcommand};
use tracing::error;

use super::{Exit, SettingsArgs};
use crate::plural::Count;
use crate::registry::{Change, Manifest, Pointer, Registry, RegistryLoss, Rollback};
use crate::serving;
use crate::serving::tracked::{RegistryState, TrackedRegistry};

#[derive(Debug, Args)]
pub(super) struct AdaptersArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(subcommand)]
    command: AdaptersCommand,
}

#[derive(Debug, Subcommand)]
enum AdaptersCommand {
    /// List all versions, newest first, and mark the one in service
    List,
    /// Print the manifest of a version as JSON
    Show {
        /// Version, or a unique prefix of at least four characters
        version: String,
    },
    /// Put a version into service, regardless of the result of its evaluation
    Promote {
        /// Version, or a unique prefix of at least four characters
        version: String,
    },
    /// Return to the version that was in service before, to a given version, or to the bare base model
    Rollback {
        /// Version, a unique prefix of at least four characters, or `base` for the bare base model
        version: Option<String>,
    },
    /// Remove old versions, keeping the newest `registry.keep` and those recently in service
    Gc,
}

pub(super) fn run(args: &AdaptersArgs, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let config = args.settings.load()?;
    let mut tracked = TrackedRegistry::recall(config.require_registry()?, config.registry.state.as_deref())?;
    let now = SystemTime::now();
    serving::runtime()?.block_on(async {
        match &args.command {
            AdaptersCommand::List => list(&to_read(&mut tracked).await?, out).await?,
            AdaptersCommand::Show { version } => {
                let registry = to_read(&mut tracked).await?;
                let version = registry.find(version).await?;
                let manifest = registry.manifest(&version).await?;
                writeln!(out, "{}", serde_json::to_string_pretty(&manifest)?)?;
            }
            AdaptersCommand::Promote { version } => {
                let registry = tracked.require_intact().await?;
                let version = registry.find(version).await?;
                let after = registry.current().await?.map_or(0, |pointer| pointer.sequence);
                let pointer = registry.promote(&version, after, now).await?;
                tracked.remember(&pointer);
                print_pointer(&pointer, out)?;
            }
            AdaptersCommand::Rollback { version } => {
                let registry = tracked.require_intact().await?;
                let target = match version.as_deref() {
                    None => Rollback::Previous,
                    Some("base") => Rollback::Base,
                    Some(version) => Rollback::To(registry.find(version).await?),
                };
                let pointer = registry.rollback(&target, now).await?;
                tracked.remember(&pointer);
                print_pointer(&pointer, out)?;
            }
            AdaptersCommand::Gc => {
                let registry = tracked.require_intact().await?;
                let _lock = registry.lock(now)?;
                let removed = registry.gc(config.registry.keep, now).await?;
                for version in &removed.versions {
                    writeln!(out, "removed {version}")?;
                }
                writeln!(
                    out,
                    "removed {}, {}, {} and {}",
                    Count(removed.versions.len(), "version"),
                    Count(removed.unfinished.len(), "unfinished version"),
                    Count(removed.records, "record"),
                    Count(removed.staged, "staged file")
                )?;
            }
        }
        Ok(Exit::Success)
    })
}

/// Returns the registry for a command that only reads it. That it is lost is logged, but does not stop the command if
/// there is something to read.
async fn to_read(tracked: &mut TrackedRegistry) -> anyhow::Result<Registry> {
    match tracked.read().await? {
        RegistryState::Lost(lost) if lost.loss == RegistryLoss::NoFolder => bail!(*lost),
        RegistryState::Lost(lost) => error!(error = %lost, "the registry has lost the version in service"),
        RegistryState::Intact(_) => {}
    }
    Ok(Registry::open(tracked.location())?)
}

async fn list(registry: &Registry, out: &mut dyn Write) -> anyhow::Result<()> {
    let current = registry.current().await?;
    let listing = registry.list().await?;
    let in_service = current.as_ref().and_then(|pointer| pointer.version.as_ref());
    for manifest in &listing.versions {
        writeln!(out, "{}", line(manifest, in_service == Some(&manifest.version)))?;
    }
    if in_service.is_none() {
        writeln!(out, "* bare base model")?;
    }
    for version in &listing.unfinished {
        writeln!(out, "  {version}  unfinished")?;
    }
    if !listing.broken.is_empty() {
        let broken: Vec<String> = listing.broken.iter().map(ToString::to_string).collect();
        bail!("some versions cannot be read:\n  {}", broken.join("\n  "));
    }
    Ok(())
}

fn line(manifest: &Manifest, is_in_service: bool) -> String {
    let mark = if is_in_service { '*' } else { ' ' };
    let facts = &manifest.facts;
    let passed = facts.gate["promote"].as_bool();
    let gate = match passed {
        Some(true) => "passed the gate",
        Some(false) => "failed the gate",
        None => "no gate verdict",
    };
    let pr_auc = facts
        .metrics
        .pointer("/figures/pr_auc/value")
        .and_then(serde_json::Value::as_f64);
    let pr_auc = pr_auc.map_or_else(String::new, |value| format!(", PR-AUC {value:.3}"));
    // The report of a version names its adapter, because the version is a hash that covers the report.
    format!(
        "{mark} {}  {}  {gate}{pr_auc}, adapter {}",
        manifest.version, facts.created_at, manifest.adapter
    )
}

fn print_pointer(pointer: &Pointer, out: &mut dyn Write) -> std::io::Result<()> {
    let version = pointer
        .version
        .as_ref()
        .map_or("the bare base model", |version| version.as_str());
    let change = match pointer.change {
        Change::Promote => "promoted",
        Change::Rollback { .. } => "rolled back to",
    };
    writeln!(out, "{change} {version} (pointer {})", pointer.sequence)
}
