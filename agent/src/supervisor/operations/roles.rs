//! Who is the primary, whose content stays, and what is served here.

use super::Operator;
use crate::config::Name;
use crate::control::api::{
    DEMOTION_SCHEMA, DemoteRequest, Demotion, FORGETTING_SCHEMA, Failure, ForgetRequest, Forgetting,
    PROMOTION_SCHEMA, PromoteRequest, Promotion, RELEASE_SCHEMA, RESOLUTION_SCHEMA, Release, ReleaseRequest,
    Resolution, ResolveRequest, SWITCH_SCHEMA, Switch, SwitchRequest, UNDOING_SCHEMA, UndoRequest, Undoing,
};
use crate::control::verbs::CarryOut;
use crate::verdict;
use crate::volume::Ask;
use std::time::Duration;

impl CarryOut<PromoteRequest> for Operator {
    async fn carry_out(&self, volume: Name, request: PromoteRequest) -> Result<Promotion, Failure> {
        let promoted = self.0.order(&volume, |answer| Ask::Promote(request.force, answer)).await?;
        Ok(Promotion {
            schema: PROMOTION_SCHEMA.to_owned(),
            volume: self.0.one_status(&volume).await?,
            milliseconds: milliseconds(promoted.took),
            rolled_back_to: promoted.rolled_back_to,
            unanswered: promoted.unanswered,
        })
    }
}

impl CarryOut<DemoteRequest> for Operator {
    async fn carry_out(&self, volume: Name, _: DemoteRequest) -> Result<Demotion, Failure> {
        let demoted = self.0.order(&volume, Ask::Demote).await?;
        Ok(Demotion {
            schema: DEMOTION_SCHEMA.to_owned(),
            volume: self.0.one_status(&volume).await?,
            released: demoted.released,
            unreleased: demoted.unreleased,
        })
    }
}

impl CarryOut<SwitchRequest> for Operator {
    async fn carry_out(&self, volume: Name, request: SwitchRequest) -> Result<Switch, Failure> {
        let host = self.0.peer_of(&volume, &request.to).await?.host;
        let switched = self.0.order(&volume, |answer| Ask::Switch(host, answer)).await?;
        Ok(Switch {
            schema: SWITCH_SCHEMA.to_owned(),
            volume: self.0.one_status(&volume).await?,
            to: request.to,
            milliseconds_without_writes: milliseconds(switched.without_writes),
        })
    }
}

impl CarryOut<ResolveRequest> for Operator {
    async fn carry_out(&self, volume: Name, request: ResolveRequest) -> Result<Resolution, Failure> {
        let ResolveRequest { keep, dry_run } = request;
        let host = match keep == self.0.name {
            true => self.0.endpoint.id(),
            false => self.0.peer_of(&volume, &keep).await?.host,
        };
        let resolved = self.0.order(&volume, |answer| Ask::Resolve(host, dry_run, answer)).await?;
        let (verdict, alternative, action) = verdict::resolution(&volume, &keep, &resolved, !dry_run);
        Ok(Resolution {
            schema: RESOLUTION_SCHEMA.to_owned(),
            volume: self.0.one_status(&volume).await?,
            keep,
            done: !dry_run,
            loses: resolved.loses,
            spares: resolved.spares,
            copies_everything: resolved.copies_everything,
            undo: resolved.can_be_undone.then(|| format!("blockmirror undo {volume}")),
            verdict,
            alternative,
            action,
        })
    }
}

impl CarryOut<UndoRequest> for Operator {
    async fn carry_out(&self, volume: Name, _: UndoRequest) -> Result<Undoing, Failure> {
        let undone = self.0.order(&volume, Ask::Undo).await?;
        Ok(Undoing {
            schema: UNDOING_SCHEMA.to_owned(),
            volume: self.0.one_status(&volume).await?,
            restored_bytes: undone.restored_bytes,
            back_to: undone.back_to,
        })
    }
}

impl CarryOut<ForgetRequest> for Operator {
    async fn carry_out(&self, volume: Name, _: ForgetRequest) -> Result<Forgetting, Failure> {
        let forgotten_bytes = self.0.order(&volume, Ask::Forget).await?;
        let volume = self.0.one_status(&volume).await?;
        Ok(Forgetting { schema: FORGETTING_SCHEMA.to_owned(), volume, forgotten_bytes })
    }
}

impl CarryOut<ReleaseRequest> for Operator {
    async fn carry_out(&self, volume: Name, request: ReleaseRequest) -> Result<Release, Failure> {
        let users = self.0.order(&volume, |answer| Ask::Release(request.force, answer)).await?;
        Ok(Release { schema: RELEASE_SCHEMA.to_owned(), volume, users })
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
