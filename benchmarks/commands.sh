#!/usr/bin/env bash
# The commands of all published runs, block by block. Together they take very long, so copy the
# block that you need. Some loops name a few combinations more than were run. The columns `commit`
# of results/*.csv say which version of the scripts made a run: older ones seeded the environments
# in another way, learned from the newest step, too, and had other intervals of entropy and
# checkpoints by default. Where the entropy interval matters, it is written out here. Some runs of
# the multi-goal task were evaluated at other intervals.
echo "commands.sh: copy a block instead of running all" >&2
exit 2

export OMP_NUM_THREADS=1  # one core for each run
ONE_ENVIRONMENT="--num-envs 1 --total-timesteps 1000000 --learning-starts 10000"
SHORT="--eval-interval 3000 --entropy-interval 400"
MULTIGOAL="--env-id multigoal_env:MultiGoal-v0 --total-timesteps 230000 --eval-interval 1000"
LONG="--env-id multigoal_env:MultiGoal-v0 --total-timesteps 430000 --eval-interval 2000"
OFFICIAL="python benchmarks/official.py --code /tmp/official"

# Ant-v4, with the defaults of 30 million steps, and stopped before
for seed in 1 2; do
    python dacer_v2.py --env-id Ant-v4 --seed $seed
    python dacer.py --env-id Ant-v4 --seed $seed --diffusion-steps 5
    python dacer.py --env-id Ant-v4 --seed $seed
done
python dacer_v2.py --env-id Ant-v4 --q-grad-weight 1

# Humanoid with and without contact forces, with the defaults, and stopped before
python dacer_v2.py --env-id Humanoid-v4
python dacer_v2.py --env-id Humanoid-v5 \
    --env-kwargs '{"include_cfrc_ext_in_observation": false, "contact_cost_weight": 0}'

# Walker2d-v4, with the defaults, and stopped before
python dacer_v2.py --env-id Walker2d-v4
python dacer.py --env-id Walker2d-v4 --diffusion-steps 5

# HalfCheetah-v4 with one environment, and stopped before
python dacer_v2.py --env-id HalfCheetah-v4 $ONE_ENVIRONMENT
python dacer.py --env-id HalfCheetah-v4 $ONE_ENVIRONMENT --diffusion-steps 5

# HalfCheetah-v4: 60,000 updates
for seed in 1 2; do
    python dacer_v2.py --env-id HalfCheetah-v4 --total-timesteps 1400000 $SHORT --seed $seed
    python dacer.py --env-id HalfCheetah-v4 --total-timesteps 1400000 $SHORT --seed $seed
done
for seed in 1 2 3 4; do
    python dacer.py --env-id HalfCheetah-v4 --total-timesteps 1400000 $SHORT --seed $seed \
        --diffusion-steps 5
done
for seed in 1 2 3; do
    $OFFICIAL --env-id HalfCheetah-v4 --total-timesteps 1400000 $SHORT --seed $seed \
        --diffusion-steps 5
done
$OFFICIAL --env-id HalfCheetah-v4 --total-timesteps 1400000 $SHORT --diffusion-steps 20

# Hopper-v4: 90,000 updates. InvertedDoublePendulum-v4 and Swimmer-v4: 60,000
for seed in 1 2; do
    python dacer_v2.py --env-id Hopper-v4 --total-timesteps 1830000 $SHORT --seed $seed
    python dacer.py --env-id Hopper-v4 --total-timesteps 1830000 $SHORT --seed $seed
    for task in InvertedDoublePendulum-v4 Swimmer-v4; do
        python dacer_v2.py --env-id $task --total-timesteps 1230000 $SHORT --seed $seed
    done
done

# Ablations on HalfCheetah-v4: 30,000 updates
ABLATION="--env-id HalfCheetah-v4 --total-timesteps 800000 $SHORT"
python dacer_v2.py $ABLATION --q-grad-weight 0
python dacer_v2.py $ABLATION --time-weight-c 0 --time-weight-d 0
while read -r steps c; do  # c is 2 / T, so that w(t) keeps its largest value.
    python dacer_v2.py $ABLATION --diffusion-steps "$steps" --time-weight-c "$c"
done <<< $'2 1\n10 0.2\n20 0.1'

# Multi-goal, the defaults: 20,000 updates. The numbers 2, 3, 8 and 12 had no part in choosing them.
for goals in 4 5 6; do
    for seed in 1 2 3 4 5; do
        python dacer_v2.py $LONG --env-kwargs "{\"num_goals\": $goals}" --seed $seed
    done
done
for goals in 2 3 8 12; do
    python dacer_v2.py $LONG --env-kwargs "{\"num_goals\": $goals}"
done

# Multi-goal, eta = 1 and the papers' w(t): 20,000 updates
for goals in 4 5 6; do
    for seed in 1 2 4 5; do
        python dacer_v2.py $LONG --env-kwargs "{\"num_goals\": $goals}" --seed $seed \
            --q-grad-weight 1 --time-weight-c 0.4 --time-weight-d -1.8
    done
done

# Multi-goal, other settings of DACERv2, and DACER: 10,000 updates
for goals in 4 5 6; do
    for seed in 1 2 3 4 5; do
        GOALS="--env-kwargs {\"num_goals\":$goals} --seed $seed"
        WEIGHTED="--time-weight-c 0.4 --time-weight-d -1.8"
        python dacer.py $MULTIGOAL $GOALS
        python dacer.py $MULTIGOAL $GOALS --diffusion-steps 5
        for eta in 1 3 5 10; do
            python dacer_v2.py $MULTIGOAL $GOALS --q-grad-weight $eta $WEIGHTED
        done
        python dacer_v2.py $MULTIGOAL $GOALS --q-grad-weight 5
    done
done
FOUR="--env-kwargs {\"num_goals\":4} --time-weight-d -1.8"
python dacer_v2.py $MULTIGOAL $FOUR --q-grad-weight 0 --time-weight-c 0.4
while read -r steps c; do
    python dacer_v2.py $MULTIGOAL $FOUR --q-grad-weight 5 --diffusion-steps "$steps" \
        --time-weight-c "$c"
done <<< $'2 1\n10 0.2\n20 0.1'

# Multi-goal, 6 goals: 50,000 updates on a GPU (DACER was stopped at 35,000)
SIX="--env-id multigoal_env:MultiGoal-v0 --env-kwargs {\"num_goals\":6} --total-timesteps 1030000"
SIX="$SIX --eval-interval 2500"
for seed in 1 2 3; do
    python dacer.py $SIX --seed $seed
    python dacer_v2.py $SIX --seed $seed --q-grad-weight 5
    for eta in 1 5; do
        python dacer_v2.py $SIX --seed $seed --q-grad-weight $eta \
            --time-weight-c 0.4 --time-weight-d -1.8
    done
done
$OFFICIAL --algorithm DSACT $SIX

# Multi-goal, other algorithms
for goals in 4 5 6; do
    for seed in 1 2 3; do
        GOALS="--env-kwargs {\"num_goals\":$goals} --seed $seed"
        for algorithm in SAC TD3 DDPG PPO TRPO; do
            python benchmarks/baselines.py --algorithm $algorithm $GOALS
        done
        for algorithm in DSACT QVPO DIPO QSM; do
            $OFFICIAL --algorithm $algorithm $MULTIGOAL $GOALS
        done
    done
done

# The tables and pictures
python benchmarks/multigoal.py
python benchmarks/report.py
python benchmarks/speed.py --tasks Hopper Ant
python benchmarks/speed.py --tasks Humanoid --out report/speed-humanoid.csv
