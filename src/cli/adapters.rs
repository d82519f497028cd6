//! `moderatord adapters`: what the registry holds, and what is in service.

use std::io::Write;
use std::time::SystemTime;

use anyhow::bail;
use clap::{Args, Subcommand};

use super::{Exit, SettingsArgs};
use crate::config::Config;
use crate::ops::log;
use crate::registry::{Change, Manifest, Pointer, Registry, Rollback};
use crate::serving;

#[derive(Debug, Args)]
pub(super) struct AdaptersArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(subcommand)]
    command: AdaptersCommand,
}

#[derive(Debug, Subcommand)]
enum AdaptersCommand {
    /// All versions, newest first, and which is in service
    List,
    /// A version's manifest, as JSON
    Show {
        /// Version, or the beginning of one
        version: String,
    },
    /// Put a version into service, whatever the gate said
    Promote {
        /// Version, or the beginning of one
        version: String,
    },
    /// Put back what was in service before, or the version given, or the bare base
    Rollback {
        /// Version, or the beginning of one, or `base`
        version: Option<String>,
    },
    /// Remove old versions, but for `registry.keep` and what is or lately was in service
    Gc,
}

pub(super) fn run(args: &AdaptersArgs, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let config = Config::load(&args.settings.sources())?;
    log::start_for_command(&config.log);
    let registry = Registry::open(config.require_registry()?)?;
    let now = SystemTime::now();
    serving::runtime()?.block_on(async {
        match &args.command {
            AdaptersCommand::List => list(&registry, out).await?,
            AdaptersCommand::Show { version } => {
                let version = registry.find(version).await?;
                let manifest = registry.show(&version).await?;
                writeln!(out, "{}", serde_json::to_string_pretty(&manifest)?)?;
            }
            AdaptersCommand::Promote { version } => {
                let version = registry.find(version).await?;
                let after = registry.current().await?.map_or(0, |pointer| pointer.sequence);
                tell(&registry.promote(&version, after, now).await?, out)?;
            }
            AdaptersCommand::Rollback { version } => {
                let to = match version.as_deref() {
                    None => Rollback::Before,
                    Some("base") => Rollback::Base,
                    Some(version) => Rollback::To(registry.find(version).await?),
                };
                tell(&registry.rollback(&to, now).await?, out)?;
            }
            AdaptersCommand::Gc => {
                let _lock = registry.lock(now)?;
                let removed = registry.gc(config.registry.keep, now).await?;
                for version in &removed.versions {
                    writeln!(out, "removed {version}")?;
                }
                writeln!(
                    out,
                    "{} versions, {} unfinished ones, {} records and {} staged files removed",
                    removed.versions.len(),
                    removed.unfinished.len(),
                    removed.records,
                    removed.staged
                )?;
            }
        }
        Ok(Exit::Success)
    })
}

async fn list(registry: &Registry, out: &mut dyn Write) -> anyhow::Result<()> {
    let current = registry.current().await?;
    let listing = registry.list().await?;
    let serving = current.as_ref().and_then(|pointer| pointer.version.as_ref());
    for manifest in &listing.versions {
        writeln!(out, "{}", line(manifest, serving == Some(&manifest.version)))?;
    }
    if serving.is_none() {
        writeln!(out, "* the bare base")?;
    }
    for version in &listing.unfinished {
        writeln!(out, "  {version}  unfinished")?;
    }
    if !listing.broken.is_empty() {
        let broken: Vec<String> = listing.broken.iter().map(ToString::to_string).collect();
        bail!("broken versions:\n  {}", broken.join("\n  "));
    }
    Ok(())
}

fn line(manifest: &Manifest, is_serving: bool) -> String {
    let mark = if is_serving { '*' } else { ' ' };
    let facts = &manifest.facts;
    let passed = facts.gate["promote"].as_bool();
    let gate = match passed {
        Some(true) => "passed the gate",
        Some(false) => "refused by the gate",
        None => "not judged",
    };
    let pr_auc = facts
        .metrics
        .pointer("/figures/pr_auc/value")
        .and_then(serde_json::Value::as_f64);
    let pr_auc = pr_auc.map_or_else(String::new, |value| format!(", PR-AUC {value:.3}"));
    format!("{mark} {}  {}  {gate}{pr_auc}", manifest.version, facts.created_at)
}

fn tell(pointer: &Pointer, out: &mut dyn Write) -> std::io::Result<()> {
    let version = pointer
        .version
        .as_ref()
        .map_or("the bare base", |version| version.as_str());
    let how = match pointer.change {
        Change::Promote => "promoted",
        Change::Rollback { .. } => "rolled back",
    };
    writeln!(out, "{how} to {version}, pointer {}", pointer.sequence)
}
