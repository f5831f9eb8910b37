//! What the fake agent answers to each verb.

use super::{Fake, resyncing, volume};
use blockmirror_agent::config::{Name, Role};
use blockmirror_agent::control::api::*;
use blockmirror_agent::control::verbs::{CarryOut, InvitationOf, PeerOf};
use blockmirror_agent::verdict;

impl CarryOut<StatusRequest> for Fake {
    async fn carry_out(&self, volume: Option<Name>, _: StatusRequest) -> Result<StatusReply, Failure> {
        let mut volumes = match &volume {
            Some(name) => vec![self.find(name)?.clone()],
            None => self.volumes.clone(),
        };
        let mut left = self.resyncing_answers.lock().unwrap();
        if let (Some(next), Some(volume)) = (left.checked_sub(1), volumes.first_mut()) {
            *left = next;
            *volume = verdict::running(resyncing(volume.facts.clone()));
        }
        Ok(self.reply(volumes))
    }
}

impl CarryOut<CreateRequest> for Fake {
    async fn carry_out(&self, (): (), request: CreateRequest) -> Result<StatusReply, Failure> {
        self.note(format!("create {}", serde_json::to_string(&request).unwrap()));
        if request.backing.ends_with("mounted") {
            return Err(Failure::new(FailureKind::Refused, "the backing is mounted; unmount it first"));
        }
        let mut facts = volume(request.name.as_str(), Role::Primary);
        facts.peers.clear();
        Ok(self.reply(vec![verdict::running(facts)]))
    }
}

impl CarryOut<InviteRequest> for Fake {
    async fn carry_out(&self, volume: Name, request: InviteRequest) -> Result<Invitation, Failure> {
        self.note(format!("invite {volume} {}", serde_json::to_string(&request).unwrap()));
        self.find(&volume)?;
        let (expires_seconds, addresses) = (request.expires_seconds, request.addresses);
        let (schema, token) = (INVITATION_SCHEMA.to_owned(), "bm1-token".to_owned());
        Ok(Invitation { schema, volume, token, expires_seconds, addresses })
    }
}

impl CarryOut<InvitationsRequest> for Fake {
    async fn carry_out(&self, volume: Name, _: InvitationsRequest) -> Result<InvitationsReply, Failure> {
        self.find(&volume)?;
        let open = (InvitationState::Open, Some(600));
        let states = [("0badcafe", open), ("0badf00d", (InvitationState::Used, None))];
        let invitations = states.map(|(id, (state, left_seconds))| InvitationStatus {
            id: id.to_owned(),
            state,
            left_seconds,
        });
        Ok(InvitationsReply {
            schema: INVITATIONS_SCHEMA.to_owned(),
            volume,
            invitations: invitations.to_vec(),
        })
    }
}

impl CarryOut<RevokeRequest> for Fake {
    async fn carry_out(
        &self,
        InvitationOf { volume, id }: InvitationOf,
        _: RevokeRequest,
    ) -> Result<InvitationsReply, Failure> {
        self.note(format!("revoke {volume} {id}"));
        self.carry_out(volume, InvitationsRequest).await
    }
}

impl CarryOut<RemovePeerRequest> for Fake {
    async fn carry_out(
        &self,
        PeerOf { volume, peer }: PeerOf,
        request: RemovePeerRequest,
    ) -> Result<PeerRemoval, Failure> {
        self.note(format!("remove {volume} {peer} {}", serde_json::to_string(&request).unwrap()));
        let verdict = verdict::peer_removal(&volume, &peer, &[], &["c".to_owned()], !request.dry_run);
        let (schema, done) = (PEER_REMOVAL_SCHEMA.to_owned(), !request.dry_run);
        Ok(PeerRemoval {
            schema,
            volume,
            peer,
            done,
            told: Vec::new(),
            untold: vec!["c".to_owned()],
            verdict,
        })
    }
}

impl CarryOut<JoinRequest> for Fake {
    async fn carry_out(&self, (): (), request: JoinRequest) -> Result<StatusReply, Failure> {
        self.note(format!("join {}", serde_json::to_string(&request).unwrap()));
        match request.token.as_str() {
            "expired" => Err(Failure::new(FailureKind::Failed, "the token is expired; ask for a new one")),
            "lost" => Err(Failure::new(FailureKind::Timeout, "the primary does not answer")),
            _ => Ok(self.reply(vec![verdict::running(volume("data", Role::Replica))])),
        }
    }
}

impl CarryOut<PeersRequest> for Fake {
    async fn carry_out(&self, volume: Name, _: PeersRequest) -> Result<PeersReply, Failure> {
        let peers = self.find(&volume)?.facts.peers.clone();
        Ok(PeersReply { schema: PEERS_SCHEMA.to_owned(), volume, peers })
    }
}

impl CarryOut<PauseRequest> for Fake {
    async fn carry_out(
        &self,
        PeerOf { volume, peer }: PeerOf,
        _: PauseRequest,
    ) -> Result<PeerStatus, Failure> {
        self.note(format!("pause {volume} {peer}"));
        self.peer(&volume, &peer)
    }
}

impl CarryOut<ResumeRequest> for Fake {
    async fn carry_out(
        &self,
        PeerOf { volume, peer }: PeerOf,
        _: ResumeRequest,
    ) -> Result<PeerStatus, Failure> {
        self.note(format!("resume {volume} {peer}"));
        self.peer(&volume, &peer)
    }
}

impl CarryOut<ModeRequest> for Fake {
    async fn carry_out(
        &self,
        PeerOf { volume, peer }: PeerOf,
        request: ModeRequest,
    ) -> Result<PeerStatus, Failure> {
        self.note(format!("mode {volume} {peer} {}", request.mode));
        Ok(PeerStatus { mode: request.mode, ..self.peer(&volume, &peer)? })
    }
}

impl CarryOut<TuneRequest> for Fake {
    async fn carry_out(
        &self,
        PeerOf { volume, peer }: PeerOf,
        request: TuneRequest,
    ) -> Result<PeerStatus, Failure> {
        let TuneRequest { compression, resync_limit_bytes } = request;
        self.note(format!("tune {volume} {peer} {compression:?} {resync_limit_bytes:?}"));
        let known = self.peer(&volume, &peer)?;
        Ok(PeerStatus { compression: compression.unwrap_or_default(), resync_limit_bytes, ..known })
    }
}

impl CarryOut<AddressRequest> for Fake {
    async fn carry_out(
        &self,
        PeerOf { volume, peer }: PeerOf,
        request: AddressRequest,
    ) -> Result<PeerStatus, Failure> {
        self.note(format!("set-address {volume} {peer} {:?}", request.addresses));
        Ok(PeerStatus { addresses: request.addresses, ..self.peer(&volume, &peer)? })
    }
}

/// "data" has a primary that can be reached.
impl CarryOut<PromoteRequest> for Fake {
    async fn carry_out(&self, volume: Name, request: PromoteRequest) -> Result<Promotion, Failure> {
        self.note(format!("promote {volume} {}", request.force));
        self.find(&volume)?;
        if volume.as_str() == "data" && !request.force {
            return Err(Failure::new(FailureKind::Refused, "a is the primary and reachable"));
        }
        Ok(Promotion {
            schema: PROMOTION_SCHEMA.to_owned(),
            volume: self.find(&volume)?.clone(),
            milliseconds: 1234,
            rolled_back_to: request.force.then_some(1_000_000_000),
            unanswered: vec!["a".to_owned()],
        })
    }
}

impl CarryOut<DemoteRequest> for Fake {
    async fn carry_out(&self, volume: Name, _: DemoteRequest) -> Result<Demotion, Failure> {
        self.note(format!("demote {volume}"));
        Ok(Demotion {
            schema: DEMOTION_SCHEMA.to_owned(),
            volume: self.find(&volume)?.clone(),
            released: vec!["b".to_owned()],
            unreleased: vec!["c".to_owned()],
        })
    }
}

impl CarryOut<SwitchRequest> for Fake {
    async fn carry_out(&self, volume: Name, request: SwitchRequest) -> Result<Switch, Failure> {
        self.note(format!("switch {volume} {}", request.to));
        let to = self.peer(&volume, &request.to)?.name;
        Ok(Switch {
            schema: SWITCH_SCHEMA.to_owned(),
            volume: self.find(&volume)?.clone(),
            to,
            milliseconds_without_writes: 850,
        })
    }
}

/// Nothing is split in "other".
impl CarryOut<ResolveRequest> for Fake {
    async fn carry_out(&self, volume: Name, request: ResolveRequest) -> Result<Resolution, Failure> {
        self.note(format!("resolve {volume} {}", serde_json::to_string(&request).unwrap()));
        let keep = self.peer(&volume, &request.keep)?.name;
        if volume.as_str() == "other" {
            return Err(Failure::new(FailureKind::Refused, "nothing to resolve"));
        }
        Ok(Resolution {
            schema: RESOLUTION_SCHEMA.to_owned(),
            volume: self.find(&volume)?.clone(),
            keep,
            done: !request.dry_run,
            loses: Stake { blocks: Some(10), bytes: Some(40960), since_unix_seconds: Some(1_000_000_000) },
            spares: Stake { blocks: None, bytes: None, since_unix_seconds: None },
            copies_everything: false,
            undo: Some("blockmirror undo data".to_owned()),
            verdict: "keeping b's content gives up 40K".to_owned(),
            alternative: "keeping this host's content would give up nothing".to_owned(),
            action: "none".to_owned(),
        })
    }
}

/// Nothing is kept of "other".
impl CarryOut<UndoRequest> for Fake {
    async fn carry_out(&self, volume: Name, _: UndoRequest) -> Result<Undoing, Failure> {
        self.note(format!("undo {volume}"));
        let status = self.find(&volume)?.clone();
        if volume.as_str() == "other" {
            return Err(Failure::new(FailureKind::Refused, "nothing is kept here"));
        }
        let schema = UNDOING_SCHEMA.to_owned();
        Ok(Undoing { schema, volume: status, restored_bytes: 12 << 20, back_to: 1_000_000_000 })
    }
}

impl CarryOut<ReleaseRequest> for Fake {
    async fn carry_out(&self, volume: Name, request: ReleaseRequest) -> Result<Release, Failure> {
        self.note(format!("release {volume} {}", request.force));
        self.find(&volume)?;
        let users = vec!["mounted at /srv/data (ext4)".to_owned()];
        if !request.force {
            return Err(Failure::new(FailureKind::Refused, format!("the device is in use: {}", users[0])));
        }
        Ok(Release { schema: RELEASE_SCHEMA.to_owned(), volume, users })
    }
}

impl CarryOut<RebuildRequest> for Fake {
    async fn carry_out(&self, volume: Name, request: RebuildRequest) -> Result<Rebuilding, Failure> {
        let RebuildRequest { backing, from, overwrite } = request;
        let from = from.map(|from| from.to_string()).unwrap_or_default();
        self.note(format!("rebuild {volume} {} {from} {overwrite}", backing.display()));
        let mut volume = self.find(&volume)?.clone();
        volume.facts.backing = backing;
        let (source, silent) = ("b".parse().unwrap(), vec!["c".parse().unwrap()]);
        Ok(Rebuilding { schema: REBUILDING_SCHEMA.to_owned(), volume, source, silent })
    }
}

impl CarryOut<ForgetRequest> for Fake {
    async fn carry_out(&self, volume: Name, _: ForgetRequest) -> Result<Forgetting, Failure> {
        self.note(format!("forget {volume}"));
        let status = self.find(&volume)?.clone();
        Ok(Forgetting { schema: FORGETTING_SCHEMA.to_owned(), volume: status, forgotten_bytes: 12 << 20 })
    }
}

/// The copy of "other" differs; a part of "unreadable" can't be read.
impl CarryOut<CompareRequest> for Fake {
    async fn carry_out(
        &self,
        PeerOf { volume, peer }: PeerOf,
        _: CompareRequest,
    ) -> Result<Comparison, Failure> {
        self.note(format!("compare {volume} {peer}"));
        self.peer(&volume, &peer)?;
        let ranges = match volume.as_str() {
            "other" => vec![Difference { offset: 8192, length: 4096 }],
            _ => Vec::new(),
        };
        let unreadable = match volume.as_str() {
            "unreadable" => vec![Difference { offset: 4 << 20, length: 4 << 20 }],
            _ => Vec::new(),
        };
        let bytes_of = |ranges: &[Difference]| ranges.iter().map(|range| range.length).sum::<u64>();
        let (different_bytes, unreadable_bytes) = (bytes_of(&ranges), bytes_of(&unreadable));
        let (verdict, action) =
            verdict::comparison(&volume, &peer, 100 << 30, different_bytes, unreadable_bytes, true);
        let schema = COMPARISON_SCHEMA.to_owned();
        let (compared_bytes, seconds) = (100 << 30, 90);
        Ok(Comparison {
            schema,
            volume,
            peer,
            compared_bytes,
            different_bytes,
            ranges,
            unreadable_bytes,
            unreadable,
            seconds,
            verdict,
            action,
        })
    }
}
