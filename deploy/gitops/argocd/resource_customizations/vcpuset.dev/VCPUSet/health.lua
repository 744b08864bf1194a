-- A VCPUSet follows the kstatus rules (https://github.com/kubernetes-sigs/cli-utils/blob/master/pkg/kstatus/README.md):
-- Ready, Reconciling and Stalled are always present and have one reason and message. The operator is not done with the
-- present spec while a condition is about another generation.
local hs = {status = "Progressing", message = "Waiting for the operator to observe the machine"}
if obj.status == nil or obj.status.conditions == nil then
  return hs
end
local conditions = {}
for _, condition in ipairs(obj.status.conditions) do
  if condition.observedGeneration == obj.metadata.generation then
    conditions[condition.type] = condition
  end
end
local ready, stalled = conditions.Ready, conditions.Stalled
if ready == nil then
  return hs
end
hs.message = ready.reason .. ": " .. ready.message
if ready.status == "True" then
  hs.status = "Healthy"
elseif ready.status == "Unknown" then -- no process observes the machine
  hs.status = "Unknown"
elseif stalled ~= nil and stalled.status == "True" then
  hs.status = "Degraded"
elseif ready.reason == "Suspended" then
  hs.status = "Suspended"
end
return hs
